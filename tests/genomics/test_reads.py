"""Loci and simulated reads: what the two protocols may and may not share."""

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from genomics.fasta import Fasta
from genomics.reads import Loci, Reads, choose_loci, distinctness, mutate
from genomics.species import SpeciesData
from genomics.vocabulary import A, T, decode, encode, reverse_complement


@pytest.fixture(scope="module")
def excerpt() -> SpeciesData:
    return SpeciesData(
        panel=16, unseen=50, locus_length=256, read_length=200, train_reads=64, val_reads=32, test_reads=64
    )


def bases(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


def write(path: Path, records: dict[str, str]) -> Fasta:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return Fasta(path)


def relatives(folder: Path, count: int = 30, length: int = 300) -> list[Fasta]:
    """Three species whose records differ in 2 % of the bases; the last records differ more."""
    rng = np.random.default_rng(0)
    ancestor = {f"locus{i}": encode(bases(rng, length)) for i in range(count)}
    return [
        write(
            folder / f"{s}.fa",
            {name: decode(mutate(ids, 0.02 + 0.02 * (i % 5), rng)) for i, (name, ids) in enumerate(ancestor.items())},
        )
        for s in "xyz"
    ]


def test_panel_and_unseen_loci_share_no_record_and_keep_the_cut_in_every_species(tmp_path: Path) -> None:
    genomes = relatives(tmp_path)
    panel, rest, homologous = choose_loci(genomes, 10, 20, 200, seed=0)
    assert homologous
    assert (len(panel), len(rest)) == (10, 9)  # 70 % of 30 records, and what is beyond
    number = {name: i for i, name in enumerate(genomes[0].lengths)}
    assert max(number[i.record] for place in panel.places for i in place) < 21
    assert min(number[i.record] for place in rest.places for i in place) >= 21
    for loci in (panel, rest):
        for locus, place in enumerate(loci.places):
            assert len({i.record for i in place}) == 1
            for species, (genome, interval) in enumerate(zip(genomes, place, strict=True)):
                read = genome.read(interval.record, interval.start, interval.end)
                assert np.array_equal(read, loci.bases[species, locus])


def test_the_panel_is_made_of_the_loci_that_differ_most(tmp_path: Path) -> None:
    genomes = relatives(tmp_path)
    panel, _, _ = choose_loci(genomes, 4, 5, 200, seed=0)
    everything, _, _ = choose_loci(genomes, 21, 5, 200, seed=0)
    chosen = {place[0].record for place in panel.places}
    values = dict(zip((p[0].record for p in everything.places), distinctness(everything), strict=True))
    assert min(values[name] for name in chosen) >= max(v for name, v in values.items() if name not in chosen)


def test_distinctness_is_that_of_the_closest_pair() -> None:
    rng = np.random.default_rng(0)
    one, other = encode(bases(rng, 100)), encode(bases(rng, 100))
    assert distinctness(Loci([], np.stack([one, other, one])[:, None])).tolist() == [0.0]
    assert distinctness(Loci([], np.stack([one, other])[:, None])).tolist() == [1.0]


def test_loci_with_n_in_one_species_are_left_out_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(20)]
    first = {name: bases(rng, 100) for name in names}
    second = {name: bases(rng, 100) for name in names}
    second["l3"] = second["l3"][:50] + "N" + second["l3"][51:]
    panel, rest, _ = choose_loci([write(tmp_path / "a.fa", first), write(tmp_path / "b.fa", second)], 13, 9, 80, 0)
    assert "l3" not in {i.record for place in (*panel.places, *rest.places) for i in place}
    assert panel.bases.min() >= A
    assert panel.bases.max() <= T


def test_case_makes_no_difference(tmp_path: Path) -> None:
    genomes = relatives(tmp_path)
    lower = tmp_path / "lower.fa"
    lower.write_text(genomes[0].path.read_text().lower().replace("locus", "locus"))
    panel, _, _ = choose_loci(genomes, 5, 5, 200, 0)
    again, _, _ = choose_loci([Fasta(lower), *genomes[1:]], 5, 5, 200, 0)
    assert np.array_equal(panel.bases, again.bases)


def test_windows_of_chromosomes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    genomes = [write(tmp_path / f"{s}.fa", {f"NC_{s}": bases(rng, 4000) + "N" * 500 + bases(rng, 5500)}) for s in "ab"]
    panel, rest, homologous = choose_loci(genomes, 20, 10, 200, seed=0)
    assert not homologous
    assert (len(panel), len(rest)) == (20, 10)
    for side, low, high in ((panel, 0, 7000), (rest, 7000, 10_000)):
        for species in range(2):
            places = sorted(place[species] for place in side.places)
            assert all(low <= i.start and i.end <= high for i in places)
            assert all(one.end <= two.start for one, two in pairwise(places))
            assert all(i.end <= 4000 or i.start >= 4500 for i in places)


def test_chromosomes_with_shared_names_are_held_out_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    genomes = [write(tmp_path / f"{s}.fa", {f"chr{i}": bases(rng, 3000) for i in (1, 2, 3)}) for s in "ab"]
    panel, rest, homologous = choose_loci(genomes, 10, 8, 200, seed=0)
    assert not homologous
    assert {i.record for place in panel.places for i in place} == {"chr1", "chr2"}
    assert {i.record for place in rest.places for i in place} == {"chr3"}


def test_too_few_loci_and_equal_genomes_are_named(tmp_path: Path) -> None:
    genomes = relatives(tmp_path)
    with pytest.raises(UserError, match=r"have 21 loci of 200 bases .* wanted 22.*--data.panel"):
        choose_loci(genomes, 22, 5, 200, 0)
    with pytest.raises(UserError, match="0 loci of 400 bases"):
        choose_loci(genomes, 5, 5, 400, 0)
    copy = tmp_path / "copy.fa"
    copy.write_text(genomes[0].path.read_text())
    with pytest.raises(UserError, match="same bases in all"):
        choose_loci([genomes[0], Fasta(copy)], 5, 5, 200, 0)


def test_mutation_rate_and_that_no_base_stays_itself() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(A, T + 1, 200_000).astype(np.uint8)
    changed = mutate(ids, 0.005, rng)
    assert 0.004 < (changed != ids).mean() < 0.006
    assert changed.min() >= A
    assert changed.max() <= T
    assert (mutate(ids, 1.0, rng) != ids).all()
    assert np.array_equal(mutate(ids, 0.0, rng), ids)


def test_individuals_of_the_parts_are_not_the_same(excerpt: SpeciesData) -> None:
    reads = {part: excerpt.reads(part) for part in ("train", "val", "test")}
    haplotypes = {
        part: {
            b"".join(r.haplotype(0, person, locus).tobytes() for locus in range(16)) for person in range(r.individuals)
        }
        for part, r in reads.items()
    }
    assert [len(haplotypes[part]) for part in reads] == [reads[part].individuals for part in reads]
    assert not haplotypes["train"] & haplotypes["test"]
    assert not haplotypes["val"] & haplotypes["test"]
    assert np.array_equal(reads["train"].haplotype(1, 2, 3), reads["train"].haplotype(1, 2, 3))


def test_reads_come_from_their_loci_on_either_strand(excerpt: SpeciesData) -> None:
    clean = Reads(excerpt.loci[0], "test", 80, 4, 200, 0.0, 0.0, True, 0)
    strands = []
    for i in range(80):
        ids, species, known = clean[i]
        assert known
        assert species == i % 4
        texts = [decode(locus) for locus in excerpt.loci[0].bases[species]]
        forward = decode(ids.tolist())
        backward = decode(reverse_complement(ids.numpy()))
        assert any(forward in text or backward in text for text in texts)
        strands.append(any(forward in text for text in texts))
    assert 20 < sum(strands) < 60


def test_unseen_reads_share_no_long_kmer_with_the_panel(excerpt: SpeciesData) -> None:
    def kmers(ids: np.ndarray, k: int = 32) -> set[bytes]:
        return {row[i : i + k].tobytes() for row in ids for i in range(row.shape[-1] - k + 1)}

    seen = kmers(excerpt.loci[0].bases.reshape(-1, 256))
    reads, species = Reads(excerpt.loci[1], "test", 100, 4, 200, 0.0, 0.0, False, 0).arrays()
    shared = [len(kmers(row[None]) & seen) / 169 for row in reads]
    assert np.mean(shared) < 0.01
    assert np.bincount(species).tolist() == [25] * 4


def test_evaluation_reads_are_fixed_and_training_reads_are_new(excerpt: SpeciesData) -> None:
    test = excerpt.reads("test")
    assert torch.equal(test[5][0], test[5][0])
    assert not torch.equal(test[5][0], test[9][0])
    train = excerpt.reads("train")
    assert not torch.equal(train[5][0], train[5][0])
    torch.manual_seed(3)
    first = train[5][0]
    torch.manual_seed(3)
    assert torch.equal(first, train[5][0])
    loaded = torch.cat([ids for ids, _, _ in excerpt.test_dataloader()])
    assert loaded.shape == (128, 200)
    assert torch.equal(loaded[5], test[5][0])


def test_the_excerpt_is_clean_and_aligned() -> None:
    folder = Path(__file__).parents[2] / "genomics" / "data"
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) < 2_000_000
    genomes = [Fasta(folder / f"{name}.fa.gz") for name in ("human", "chimpanzee", "gorilla", "orangutan")]
    assert len({tuple(genome.lengths) for genome in genomes}) == 1
    assert all(set(np.unique(genome.read(name))) <= {7, 8, 9, 10} for genome in genomes for name in genome.lengths)
    same = [np.mean(g.read(name, 0, 12) == genomes[0].read(name, 0, 12)) for g in genomes for name in g.lengths]
    assert np.mean(same) > 0.95


def test_species_with_the_same_bases(tmp_path: Path) -> None:
    """In files of another kind, under other names."""
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 3000))
    (tmp_path / "one.fa").write_text(f">a\n{text}\n")
    (tmp_path / "two.fa.gz").write_bytes(gzip.compress(f">b\n{text.lower()}\n".encode()))
    files = {"one": str(tmp_path / "one.fa"), "two": str(tmp_path / "two.fa.gz")}
    with pytest.raises(UserError, match="'one' and 'two' have the same bases, in "):
        SpeciesData(fasta=files)
    (tmp_path / "two.fa.gz").write_bytes(gzip.compress(f">b\n{text[:-1]}\n>c\nA\n".encode()))
    SpeciesData(fasta=files, panel=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fasta": {"a": "x.fa"}}, "got 1 species"),
        ({"fasta": {"a": "x.fa", "b": "./x.fa"}}, "'a' and 'b' have one and the same file"),
        ({"source": "genomes"}, "the excerpt .* holds loci; give a genome a species"),
        ({"read_length": 999}, "longer than --data.locus_length 640"),
        ({"panel": 0}, "--data.panel is 0"),
        ({"error_rate": 1.5}, "--data.error_rate is 1.5"),
        ({"train_reads": 5}, "less than one batch"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpeciesData(**options)


def test_reads_of_the_loci_in_use(tmp_path: Path) -> None:
    """Few loci at first; all of them again are the reads that they always were."""
    bases = np.random.default_rng(0).integers(A, T + 1, (2, 20, 40), dtype=np.uint8)
    reads = Reads(Loci([()] * 20, bases), "train", 200, 1, 40, 0.0, 0.0, True, 0, fixed=True)

    def seen() -> set[int]:
        texts = [reads[i][0].numpy().astype(np.uint8) for i in range(200)]
        both = [{t.tobytes(), reverse_complement(t).tobytes()} for t in texts]
        return {p for p in range(20) for b in both if b & {bases[s, p].tobytes() for s in range(2)}}

    before = reads.arrays()[0]
    reads.in_use.fill_(3)
    assert seen() == set(reads.order[:3].tolist())
    reads.in_use.fill_(20)
    assert seen() == set(range(20))
    assert np.array_equal(reads.arrays()[0], before)
