"""From text and synthetic tasks to packed rows: `readers` (documents), `sources` (token streams), `packing` (rows and batches)."""
