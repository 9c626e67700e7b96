"""Models over several processes: a sequence cut into parts (``sequence``), a layer cut into heads (``tensor``)."""
