"""Writes docs/differential.md from the ledger of a run (engine/core/tests/differential/ledger.rs)."""

import datetime
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("differential.md")
BEGIN, END = "<!-- differential: begin -->", "<!-- differential: end -->"
LEFT = {
    "NotOffered": "the CPU model does not offer it",
    "NotOnHost": "the host's CPU lacks it",
    "Kernel": "it calls the host's kernel or hypervisor",
    "HostProperty": "it reads a property of the host (time, random numbers, CPUID, tables) or saves state in the host's format",
    "DescriptorTables": "it works on descriptor tables, which differ between host and guest",
}


def section(ledger: str, today: datetime.date) -> str:
    """The section's text; ValueError when the ledger is not one."""
    rows: dict[str, list[list[str]]] = {}
    for line in ledger.splitlines():
        kind, *fields = line.split("\t")
        rows.setdefault(kind, []).append(fields)
    [[compared, seed, seconds, unexplained, tiers]] = rows["run"]
    faults = sum(int(count) for _, count in rows["vector"])
    lines = [
        "## Instructions compared with the host's CPU",
        "",
        f"**{int(compared):,} comparisons, {unexplained} unexplained differences** ({faults:,} faulting), {today}, {seconds} s, two cores.",
        f"In {int(tiers):,} cases the engine's two tiers, reference handlers and blocks of fast ones, were compared with each other too.",
        f"Repeat with `make differential CASES={compared} SEED={seed}`.",
        "",
        "Each comparison runs one generated instruction at CPL 3 on the engine and on the host, in 64-bit mode or in a code segment of 32",
        "or 16 bits, and compares general registers, RIP, RFLAGS, x87, XMM and YMM registers, MXCSR, memory, and the exception with its",
        "error code and address.",
        "",
        "| family | forms | comparisons | faulting |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {forms} | {int(count):,} | {int(faulting):,} |" for name, forms, count, faulting in rows["family"]),
        "",
        "Explained differences:",
        "",
        "| reason | cases | instructions | why |",
        "|---|--:|---|---|",
        *(f"| {name} | {int(count):,} | {who} | {text} |" for name, count, who, text in rows.get("explained", [])),
        "",
        "Opcode forms that are not compared here:",
        "",
        *(f"- {count}: {LEFT[reason]}" for reason, count in rows["left"]),
        "",
        "## Ledger",
        "",
        "Comparisons of each instruction in code of 64, 32 and 16 bits, and how many of them faulted.",
        "",
        "| instruction | family | 64 bits | 32 bits | 16 bits | faulting |",
        "|---|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {family} | {' | '.join(f'{int(count):,}' for count in counts)} |"
            for family, name, *counts in sorted(rows["instruction"], key=lambda row: (row[1], row[0]))
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Replaces the section between the two markers, or appends it."""
    text = section(Path(sys.argv[1]).read_text(), datetime.datetime.now(tz=datetime.UTC).date())
    page = PAGE.read_text() if PAGE.exists() else f"# Differential runs\n\n{BEGIN}\n{END}\n"
    if BEGIN not in page:
        page += f"\n{BEGIN}\n{END}\n"
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
