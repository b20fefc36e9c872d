"""The page about kvm-unit-tests, from results as the suite prints them."""

from __future__ import annotations

import datetime

from docs import conformance

OUTPUT = """\
\x1b[32mPASS\x1b[0m access (1 tests)
PASS vmexit_cpuid\x20
\x1b[31mFAIL\x1b[0m setjmp (2 tests, 1 unexpected failures)
\x1b[33mSKIP\x1b[0m svm_npt (0 tests)
\x1b[33mSKIP\x1b[0m taskswitch (i386 only)
some other line
"""


def test_the_page_counts_and_explains() -> None:
    page = conformance.page(conformance.results(OUTPUT), "abc123", datetime.date(2026, 1, 2))
    assert "kvm-unit-tests abc123" in page
    assert "2026-01-02: **2 of 5 configurations pass**" in page
    assert "`access`, `vmexit_cpuid`" in page
    assert "| `setjmp` | fail | 2 tests, 1 unexpected failures |" in page
    assert "| `svm_npt` | skip | nested SVM is not implemented |" in page
    assert "| `taskswitch` | skip | a 32-bit program" in page
