"""The commands end to end: small runs, their figures, and one message for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.cli import CONFIGS, main
from core.errors import UserError
from genomics.data.cut import cut
from genomics.predict import predict
from genomics.warmup import PanelWarmup

TINY = ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
SMALL_LM = [
    "--model.d_model", "8", "--model.n_layer", "1", "--data.window", "64", "--trainer.max_epochs", "1",
    "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "2",
]  # fmt: skip


def classify(*argv: str) -> None:
    main(
        "genomics", "genomics.classifier.SpeciesClassifier", "genomics.species.SpeciesData",
        default_recipe="great_apes", links={"data.num_classes": "model.num_classes"}, argv=argv,
    )  # fmt: skip


def pretrain(*argv: str) -> None:
    main(
        "genomics", "genomics.language.LanguageModel", "genomics.datasets.GenomeData", default_recipe="pretrain",
        argv=argv,
    )  # fmt: skip


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def random_fasta(path: Path, records: int, length: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    text = "".join(f">{path.stem}{i}\n{''.join(rng.choice(list('ACGT'), length))}\n" for i in range(records))
    path.write_text(text)
    return str(path)


def test_smoke_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    classify("smoke", "--run_dir", str(run), *TINY)
    found = metrics(run)
    assert found["baseline/chance_accuracy"] == 0.25
    for name in ("test/accuracy", "test/unseen_loci_accuracy", "baseline/kmer_accuracy"):
        assert 0 <= found[name] <= 1
    assert found["baseline/kmer_accuracy"] > 0.6
    page = (run / "report.html").read_text()
    for title in ("Accuracy", "Confusion matrix: loci never seen", "Why loci never seen are near chance", "Curves"):
        assert f"<h2>{title}</h2>" in page
    out = capsys.readouterr().out
    assert "k-mer logistic regression" in out
    assert out.splitlines()[-1] == str(run)
    classify(
        "smoke", "predict", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--run_dir", str(tmp_path / "p")
    )
    rows = (tmp_path / "p" / "predictions.csv").read_text().splitlines()
    assert rows[0] == "loci,species,predicted,probability"
    assert len(rows) == 1 + 2 * 32


def test_pretrain_then_classify_on_files_of_ones_own(tmp_path: Path) -> None:
    files = {name: random_fasta(tmp_path / f"{name}.fa", 3, 3000, seed) for seed, name in enumerate(("cat", "dog"))}
    run = tmp_path / "lm"
    pretrain("pretrain", "--data.fasta", files["cat"], "--run_dir", str(run), *SMALL_LM, *TINY)
    found = metrics(run)
    assert 3.5 < found["test/perplexity"] < 30
    assert 3.9 < found["baseline/markov_0_perplexity"] < 4.1
    assert found["test/perplexity"] == pytest.approx(np.exp(found["test/loss"]))
    assert "Perplexity on held-out loci" in (run / "report.html").read_text()
    checkpoint = str(run / "checkpoints" / "best.ckpt")
    species = [word for name, file in files.items() for word in (f"--data.fasta.{name}", file)]
    size = ["--model.d_model", "8", "--model.d_conv", "12", "--data.panel", "5", "--model.pretrained", checkpoint]
    classify("smoke", *species, *size, "--run_dir", str(tmp_path / "c"), *TINY)
    assert metrics(tmp_path / "c")["baseline/chance_accuracy"] == 0.5
    assert "<td>cat" in (tmp_path / "c" / "report.html").read_text()


def test_bases_weigh_the_same_in_whatever_batches(tmp_path: Path) -> None:
    file = random_fasta(tmp_path / "a.fa", 5, 777, 0)
    lm = ["--data.fasta", file, *SMALL_LM, *TINY]
    pretrain("pretrain", *lm, "--run_dir", str(tmp_path / "one"))
    for batch in ("1", "5"):
        pretrain(
            "pretrain", "test", "--ckpt_path", str(tmp_path / "one" / "checkpoints" / "best.ckpt"),
            "--data.batch_size", batch, "--run_dir", str(tmp_path / batch), *lm,
        )  # fmt: skip
    losses = [metrics(tmp_path / name)["test/loss"] for name in ("one", "1", "5")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("command", "content", "options", "message"),
    [
        (pretrain, ">a\nAC7GT\n", [], r"'a': character '7' at position 3"),
        (pretrain, "", [], "is empty"),
        (pretrain, ">a\n" + "ACGT" * 50 + "\n", [], "shorter than the window of 1,024"),
        (pretrain, None, [], r"no FASTA file at .*x\.fa; give the path of one"),
        (classify, ">a\nAC7GT\n", [], r"x\.fa: record 'a': character '7' at position 3 .* correct the file"),
        (classify, "", [], "is empty; wanted FASTA records"),
        (classify, None, [], "no FASTA file at"),
        (pretrain, ">a\n>b\nACGT\n", [], "record 'a' has a header and no bases"),
        (pretrain, ">a\nACGT\n", ["--data.windw", "9"], "did you mean --data.window"),
        (pretrain, ">a\nACGT\n", ["--data.window", "long"], "--data.window is 'long'; wanted int"),
        (pretrain, ">a\nACGT\n", ["--model.d_model", "0"], "d_model: got 0"),
        (classify, "MKLV\n", [], "is no FASTA file"),
        (classify, ">a\n" + "ACGT" * 50 + "\n", [], "0 loci of 640 bases"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command, content: str | None, options: list[str], message: str
) -> None:
    path = tmp_path / "x.fa"
    if content is not None:
        path.write_text(content)
    if command is classify:
        random_fasta(tmp_path / "y.fa", 3, 3000, 0)
        options = ["--data.fasta.x", str(path), "--data.fasta.y", str(tmp_path / "y.fa"), *options]
    else:
        options = ["--data.fasta", str(path), *options]
    with pytest.raises(SystemExit) as stop:
        command(*options, "--run_dir", str(tmp_path / "run"))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert [line for line in error.splitlines() if line.startswith("error:")] == error.splitlines()
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_recipes_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command, word in ((classify, "great_ape"), (pretrain, "pretrian")):
        with pytest.raises(SystemExit) as stop:
            command(word)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert re.fullmatch(rf"error: unknown recipe '{word}' \(did you mean .*\?\); recipes: .*\n", error)


def test_a_folder_without_genomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "genomes").mkdir()
    with pytest.raises(SystemExit) as stop:
        pretrain("pretrain", "--data.fasta", str(tmp_path / "genomes"), "--run_dir", str(tmp_path / "run"))
    assert stop.value.code == 2
    assert "genomes holds no genome files; wanted names in .fa" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_species_with_one_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = random_fasta(tmp_path / "a.fa", 3, 3000, 0)
    words = [
        "-m",
        "genomics.classify",
        "--data.fasta.cat",
        file,
        "--data.fasta.dog",
        file,
        "--run_dir",
        str(tmp_path / "r"),
    ]
    done = subprocess.run([sys.executable, *words], cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "'cat' and 'dog' have one and the same file" in done.stderr


def test_a_checkpoint_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"net.weight": torch.zeros(3)}, "hyper_parameters": {}}, tmp_path / "x.ckpt")
    for argv in (["--model.pretrained", str(tmp_path / "x.ckpt")], ["test", "--ckpt_path", str(tmp_path / "x.ckpt")]):
        with pytest.raises(SystemExit) as stop:
            classify("smoke", *argv, "--run_dir", str(tmp_path / "run"))
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("error:") == 1


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "genomics").glob("*.yaml")))
def test_recipes_parse(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    head = (CONFIGS / "genomics" / f"{recipe}.yaml").read_text().partition("seed_everything")[0]
    command = classify if head.startswith("# genomics.classify:") else pretrain
    with pytest.raises(SystemExit) as stop:
        command(recipe, "--print_config")
    assert stop.value.code == 0
    assert "d_conv:" in capsys.readouterr().out
    for word in ("Data:", "Command:", "Expect:", "Paper:"):
        assert f"# {word}" in head


@pytest.mark.slow
def test_the_script_that_cuts_the_excerpt(tmp_path: Path) -> None:
    """Cutting the excerpt again, from itself as the source, keeps every block."""
    source = CONFIGS.parent / "genomics" / "data"
    for species in ("human", "chimpanzee", "gorilla", "orangutan"):
        (tmp_path / f"{species}.chr22blocks.fa.gz").write_bytes((source / f"{species}.fa.gz").read_bytes())
    (tmp_path / "out").mkdir()
    cut(str(tmp_path), str(tmp_path / "out"))
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()


@pytest.mark.slow
def test_the_default_run_reaches_95_percent_on_known_loci_and_chance_on_others(tmp_path: Path) -> None:
    classify("great_apes", "--run_dir", str(tmp_path / "run"), *TINY)
    found = metrics(tmp_path / "run")
    assert found["test/accuracy"] >= 0.95
    assert abs(found["test/unseen_loci_accuracy"] - 0.25) < 0.06
    assert abs(found["baseline/kmer_unseen_loci_accuracy"] - 0.25) < 0.06


@pytest.mark.slow
def test_pretraining_beats_every_markov_chain(tmp_path: Path) -> None:
    pretrain("pretrain", "--run_dir", str(tmp_path / "run"), *TINY)
    found = metrics(tmp_path / "run")
    assert found["test/perplexity"] < found["baseline/markov_best_perplexity"] - 0.05


def test_generative_classifier_of_a_growing_panel(tmp_path: Path) -> None:
    """The options together, and the checkpoint in genomics.predict: a bin's answer doesn't depend on the pieces."""
    run, grow = tmp_path / "run", "--trainer.callbacks"
    classify(
        "smoke", "--run_dir", str(run), *TINY, "--model.goal", "generative", "--test_after_fit", "false",
        "--model.kmer", "4",
        f"{grow}+=genomics.warmup.PanelWarmup", f"{grow}.start=3", f"{grow}.below=99", f"{grow}.steps=1",
    )  # fmt: skip
    rows = [line.split(",") for line in (run / "logs" / "metrics.csv").read_text().splitlines()]
    loci = [float(row[rows[0].index("train/loci")]) for row in rows[1:] if row[rows[0].index("train/loci")]]
    assert loci == [4, 6, 9, 13]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert next(s for name, s in saved["callbacks"].items() if "PanelWarmup" in name)["count"] == 13
    fasta, found = random_fasta(tmp_path / "a.fa", 1, 96, 0), []
    for piece in (32, 96):
        predict(str(run), fasta, bin=32, piece=piece, out=str(tmp_path / f"out{piece}"))
        found.append((tmp_path / f"out{piece}" / "predictions.bed").read_text())
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 3
    with pytest.raises(UserError, match="PanelWarmup: start is 0"):
        PanelWarmup(0)
