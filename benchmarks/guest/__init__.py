"""The same guest under softkvm, under QEMU's TCG, and its programs natively: `python -m benchmarks.guest`.

`cases` is what is measured, `machines` who runs it, `results` what comes out, `table`, `plot` and `page` how it is shown.
"""
