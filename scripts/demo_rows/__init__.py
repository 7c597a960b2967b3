"""The generator of the demo data: templates of our own, answered by computing (see :mod:`demo_rows.rows`)."""
