"""Writes docs/differential.md from the ledger of a run (engine/core/tests/differential/ledger.rs), and finds Unicorn for it."""

import datetime
import importlib.util
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
    [[compared, seed, seconds, unexplained, tiers, model]] = rows["run"]
    agrees, differs, _ = (sum(int(row[place]) for row in rows["family"]) for place in (4, 5, 6))
    faults = sum(int(count) for _, count in rows["vector"])
    lines = [
        "## Instructions compared with the host's CPU",
        "",
        f"**{int(compared):,} comparisons, {unexplained} unexplained differences** ({faults:,} faulting), {today}, {seconds} s, two cores.",
        f"Unicorn was asked about {agrees + differs:,} of them.",
        f"{int(tiers):,} comparisons more were between the engine's tiers: reference handlers, blocks of fast ones, and host code.",
        f"Repeat with `make differential CASES={compared} SEED={seed}`.",
        "",
        "Each comparison runs one generated instruction at CPL 3 on the engine and on the host, in 64-bit mode or in a code segment of 32",
        "or 16 bits, and compares general registers, RIP, RFLAGS, x87, XMM and YMM registers, MXCSR, memory, and the exception with its",
        "error code and address.",
        "",
        f"The engine's CPU is `{model}`, the model of the host's vendor, with every instruction that the engine has. What the manuals",
        "leave undefined is what one stated silicon of the vendor does (`engine/core/src/model/silicon.rs`); a smaller run in the tests",
        "compares the other vendor's model, which differs where the vendors do.",
        "",
        "| family | forms | comparisons | faulting |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {forms} | {int(count):,} | {int(faulting):,} |" for name, forms, count, faulting, *_ in rows["family"]),
        "",
        "Explained differences:",
        "",
        "| reason | cases | instructions | why |",
        "|---|--:|---|---|",
        *(f"| {name} | {int(count):,} | {who} | {text} |" for name, count, who, text in rows.get("explained", [])),
        "",
        *unicorn(rows),
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


def unicorn(rows: dict[str, list[list[str]]]) -> list[str]:
    """What Unicorn says; nothing where the run was made without it."""
    families = [(row[0], *map(int, row[4:7])) for row in rows["family"] if any(map(int, row[4:7]))]
    if not families:
        return []
    differing = sorted(rows.get("unicorn", []), key=lambda row: -int(row[2]))
    return [
        "### Unicorn, the second oracle",
        "",
        "Unicorn 2 is the translator of QEMU 5.0 as a library. It is asked about cases of 64- and 32-bit code in which engine and host",
        "are the same and raise no exception, for families that it has, and about x87 where all exceptions are masked and no stack fault",
        "is raised. Not looked at are undefined flags and the exception flags of x87 and MXCSR, which it does not keep. Where it differs,",
        "the host decides.",
        "",
        "| family | Unicorn agrees | differs | lacks the instruction |",
        "|---|--:|--:|--:|",
        *(f"| {name} | {agrees:,} | {differs:,} | {lacks:,} |" for name, agrees, differs, lacks in families),
        "",
        "It differs in (cases): " + ", ".join(f"{name} {int(count):,}" for _, name, count in differing) + ".",
        "",
    ]


def library() -> Path:
    """Where the PyPI package `unicorn` has its library."""
    found = importlib.util.find_spec("unicorn")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("unicorn is not installed: `make build` does it")
    return next(Path(found.submodule_search_locations[0]).glob("lib/libunicorn.so*"))


def main() -> None:
    """Replaces the section between the two markers, or appends it; `--unicorn` prints where the second oracle is."""
    if sys.argv[1] == "--unicorn":
        print(library())
        return
    text = section(Path(sys.argv[1]).read_text(), datetime.datetime.now(tz=datetime.UTC).date())
    page = PAGE.read_text() if PAGE.exists() else f"# Differential runs\n\n{BEGIN}\n{END}\n"
    if BEGIN not in page:
        page += f"\n{BEGIN}\n{END}\n"
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
