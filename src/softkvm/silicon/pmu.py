"""The performance monitoring unit and the last branch records of a core: how the host programs them, and what VM entry and exit do to them.

Counters, LBR stack, GLOBAL_CTRL and the core's LVTPC belong to the `Core`, not to a vCPU. Sources: SDM vol. 3, ch. 18 (LBR) and ch. 20
(performance monitoring), 25.6 to 27 (VM entry and exit); APM vol. 2, 13.2 and 15.24; `engine/core/src/pmu/` is the implementation.

**Host accesses.** The host is not simulated, so between two runs nothing counts; its RDMSR and WRMSR are `Core.pmu_read(index)` and
`Core.pmu_write(index, value)`. ValueError stands for #GP: no such register, reserved bits, a value that is not canonical. Both wait while
the core runs, so another thread kicks it first or lets the core's own thread do it (an IPI). They reach, on Intel silicon:

| registers | notes |
|---|---|
| PMC0..3 (C1), A_PMC0..3 (4C1), EVTSEL0..3 (186) | C1 writes sign-extend 32 bits; 4C1 takes 48; bits 63:32 of EVTSEL are #GP |
| FIXED_CTR0..2 (309), FIXED_CTR_CTRL (38D) | ANY bits are accepted and mean nothing: one thread per core |
| GLOBAL_STATUS (38E, read-only), GLOBAL_CTRL (38F), GLOBAL_STATUS_RESET = OVF_CTRL (390), STATUS_SET (391), INUSE (392) | version 4 |
| PERF_CAPABILITIES (345, read-only) | 3005h: LBR format 5, freeze in SMM, full-width writes |
| DEBUGCTL (1D9) | the host's own; bits LBR, BTF, 11, 12, 14 |
| LBR_SELECT (1C8), LBR_TOS (1C9), FROM/TO/INFO (680, 6C0, DC0, 32 each) | FROM and TO must be canonical |
| PRED_CMD (49) | bit 0 makes the branch predictor forget, so that what follows mispredicts |
| LVTPC: x2APIC MSR 834h | of the core's local APIC; no guest reaches it |

and on AMD silicon PERF_CTL/PERF_CTR 0..5 (C0010200..C001020B), their old names (C0010000..C0010007), DEBUGCTL, PRED_CMD and LVTPC. Guest
accesses that `msr_bitmap` lets through, and RDPMC without its intercept, reach the same registers of the core (RDPMC needs CR4.PCE
outside CPL 0; index 0..3, 1 << 30 | 0..2 on Intel; 0..5 on AMD; bit 31 asks for the low half on Intel). Without `msr_bitmap`'s leave they
exit as every MSR does. LVTPC is never the guest's.

**VM entry and exit**, Intel silicon:
- `Control.perf_controls` bit `LOAD_GUEST_GLOBAL_CTRL`: entry loads GLOBAL_CTRL from `Control.guest_perf_global_ctrl`; reserved bits in it
  fail the entry (invalid guest state). Bit `SAVE_GUEST_GLOBAL_CTRL`: exit saves it there, for a guest that writes it without exits. Bit
  `LOAD_HOST_GLOBAL_CTRL`: exit loads it from `Control.host_perf_global_ctrl`. Without them it stays what it was. This is the atomic switch
  that `exclude_host` and `exclude_guest` are made of.
- `State.debugctl` is loaded at every entry and saved at every exit ("load/save debug controls"), and the core's DEBUGCTL is zero after an
  exit: the host writes its own back if it wants it.
- The LBR stack, TOS, LBR_SELECT and all counters are untouched by entry and exit: who shares a core saves and restores them. AMD silicon
  has no GLOBAL_CTRL: PERF_CTL's GuestOnly (bit 40) without HostOnly (41), or neither, counts in the guest; HostOnly alone does not. There
  too `State.debugctl` is the guest's.

**Overflow.** A counter that wraps sets its bit in GLOBAL_STATUS, at the instruction boundary after the event (no skid). If its INT
(EVTSEL bit 20) or PMI bit (FIXED_CTR_CTRL) is set: with DEBUGCTL bit 11 the LBR stack freezes (GLOBAL_STATUS bit 58), with bit 12 all
counters do (bit 59), until 1 is written to that bit of 390h: Cascade Lake's version 4 leaves DEBUGCTL and GLOBAL_CTRL alone. A hypervisor
that shows its guest version 2 clears the guest's DEBUGCTL.LBR itself when it injects the PMI. Then the interrupt goes through LVTPC:
masked, it is lost; mode NMI makes the guest exit with reason 0 and `Exit.interruption` 80000202h (SVM: 61h); mode fixed makes it exit as
any host interrupt. Intel silicon sets LVTPC's mask bit then, so the handler writes LVTPC again; AMD silicon does not, and has no status
to ask: the handler looks at the counters' sign. What comes at the last moment before an exit, and what comes during `Control.emulate`,
waits in the core for the next entry.

**Virtual interrupts.** With `Control.perf_controls` bit `VIRTUAL_PMI` the interrupts of overflows are the guest's, as its local APIC's
other interrupts are with APIC virtualization on metal: they go through `Control.virtual_lvtpc`. Masked, one is lost; an NMI is taken by
the guest at once, without an exit, and sets the mask; any other mode, and an NMI while NMIs are blocked or in an interrupt shadow, leaves
the guest as above. One that comes at the last moment before an exit is pending in bit 12 of `virtual_lvtpc`. DEBUGCTL bit 11 then clears
DEBUGCTL.LBR, as in version 2, instead of freezing the stack. A guest's accesses to 834h that `msr_bitmap` lets through are to
`virtual_lvtpc`, and what it may write to 390h and to DEBUGCTL without an exit is limited by `Control.guest_status_mask` and
`guest_debugctl_mask`.

**What is counted.** Instructions retired in the guest (`Exit.instructions` with a privilege filter): an instruction that faults or exits
is not retired, REP counts once, what the hypervisor skips it adds itself. Each instruction counts at the privilege level that it began at.
RDPMC and RDMSR tell what was before them; a WRMSR that starts a counter counts, one that stops it does not. Core cycles and reference
cycles are the same clock: 1 per retired instruction, 4 more for LOOPcc, 16 more for a mispredicted branch. It stands still outside the
guest and in HLT, and depends on nothing of the host, so every run of the same code counts the same. Branch events are exact;
mispredictions come from a stated predictor (`engine/core/src/pmu/predictor.rs`). Page walks are those that the engine makes, whose TLB is
larger than a processor's. There is no cache: the LLC events, which leaf 0Ah may not deny without a warning of Linux, count the walks for
data. `EVENTS` lists what counts; any other event counts nothing. With CMASK n, at most one event happens in a cycle: 1 counts as 0 does,
more never counts, INV counts the other cycles.

**Branch log.** `Core.branch_log_start(capacity, rings, low, high)` makes the core write every taken transfer of control in the guest to a
buffer of `capacity` records; `Core.branch_log_read()` takes them out, oldest first, in records of `BRANCH_RECORD`; `branch_log_stop()`
ends it. `rings`: sum of 1 kernel, 2 user, by the ring of FROM; `low <= FROM <= high`. The core leaves the guest as for a host interrupt
when the buffer is three quarters full, so whoever reads after every exit loses nothing; `Core.counters()["branches_lost"]` tells if one
was.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

LOAD_GUEST_GLOBAL_CTRL: Final = 1 << 0
LOAD_HOST_GLOBAL_CTRL: Final = 1 << 1
SAVE_GUEST_GLOBAL_CTRL: Final = 1 << 2
VIRTUAL_PMI: Final = 1 << 3
"""Bits of `Control.perf_controls`."""

NMI_EXIT_INFO: Final = 0x8000_0202
"""`Exit.interruption` of an NMI that made a guest leave (SDM vol. 3, 25.9.2)."""

MSR_LVTPC: Final = 0x834
"""The core's LVT entry for performance monitoring interrupts (x2APIC)."""
LVTPC_MASKED: Final = 1 << 16
LVTPC_NMI: Final = 4 << 8
LVTPC_PENDING: Final = 1 << 12

LBR_ENTRIES: Final = 32
"""Depth of Cascade Lake's LBR stack."""
COUNTER_BITS: Final = 48

GLOBAL_STATUS_LBR_FROZEN: Final = 1 << 58
GLOBAL_STATUS_COUNTERS_FROZEN: Final = 1 << 59


class Debugctl(IntFlag):
    """Bits of IA32_DEBUGCTL that the silicon has."""

    LBR = 1 << 0
    BTF = 1 << 1
    FREEZE_LBRS_ON_PMI = 1 << 11
    FREEZE_PERFMON_ON_PMI = 1 << 12
    FREEZE_WHILE_SMM = 1 << 14


class BranchKind(IntEnum):
    """What transferred control: `kind` of a branch record."""

    CR3 = 0  # no branch: `to` is the new CR3 of all records that follow
    CONDITIONAL = 1  # Jcc, JrCXZ
    LOOP = 2
    JUMP = 3
    INDIRECT_JUMP = 4
    CALL = 5
    ZERO_CALL = 6  # CALL to the next instruction
    INDIRECT_CALL = 7
    RETURN = 8
    FAR_JUMP = 9
    FAR_CALL = 10
    FAR_RETURN = 11
    SYSCALL = 12  # and SYSENTER
    SYSRET = 13  # and SYSEXIT
    IRET = 14
    SOFTWARE_INTERRUPT = 15  # INT n, INT1, INT3, INTO
    EXCEPTION = 16
    INTERRUPT = 17  # external, and NMI


BRANCH_RECORD: Final = Struct("<QQBBBBI")
"""from, to, kind (`BranchKind`), flags (bit 0 mispredicted), privilege level before, after, vector (of the last three kinds, else 0)."""

EVENTS: Final = {
    "GenuineIntel": {
        0x003C: "core cycles",
        0x013C: "reference cycles",
        0x00C0: "instructions retired",
        0x01C0: "instructions retired",
        0x00C4: "branches retired, taken or not",
        0x01C4: "conditional branches",
        0x02C4: "near calls",
        0x04C4: "branches retired, taken or not",
        0x08C4: "near returns",
        0x10C4: "branches not taken",
        0x20C4: "near branches taken",
        0x40C4: "far branches",
        0x00C5: "branches mispredicted",
        0x01C5: "conditional branches mispredicted",
        0x02C5: "near calls mispredicted",
        0x04C5: "branches mispredicted",
        0x20C5: "near branches taken and mispredicted",
        0x4F2E: "last-level cache references: page walks for data",
        0x412E: "last-level cache misses: page walks for data",
        0x0108: "page walks for loads",
        0x0E08: "page walks for loads that find a page",
        0x0149: "page walks for stores",
        0x0E49: "page walks for stores that find a page",
        0x0185: "page walks for instructions",
        0x0E85: "page walks for instructions that find a page",
    },
    "AuthenticAMD": {
        0x0045: "page walks for data that find a page",
        0x0076: "core cycles",
        0x0085: "page walks for instructions that find a page",
        0x00C0: "instructions retired",
        0x00C2: "branches retired, taken or not",
        0x00C3: "branches mispredicted",
        0x00C4: "branches taken",
        0x00C5: "branches taken and mispredicted",
        0x00C6: "far transfers, interrupts and exceptions",
        0x00C8: "near returns",
        0x00C9: "near returns mispredicted",
        0x00CA: "indirect branches mispredicted",
        0x00D1: "conditional branches",
    },
}
"""Event select and unit mask (`umask << 8 | event`) of what counts, by vendor; AMD's unit mask is ignored."""
