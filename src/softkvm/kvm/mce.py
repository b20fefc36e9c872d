"""Machine check registers: banks that never report anything by themselves, but keep what the guest or the VMM puts into them.

Answers to SDM vol. 3, 16.3 and Linux 6.1 `arch/x86/kvm/x86.c` (`get_msr_mce()`, `set_msr_mce()`, `kvm_vcpu_ioctl_x86_set_mce()`).
"""

from __future__ import annotations

import errno
from enum import Enum

from softkvm.kvm.msr_index import IA32_MC0_CTL, IA32_MC0_CTL2, IA32_MCG_CAP, IA32_MCG_CTL, IA32_MCG_STATUS
from softkvm.uapi.kvm import X86Mce

MAX_BANKS = 32
DEFAULT_BANKS = 10
CAP_CTL, CAP_CMCI, CAP_SER, CAP_LMCE = 1 << 8, 1 << 10, 1 << 24, 1 << 27
SUPPORTED_CAPABILITIES = CAP_CTL | CAP_SER
"""MCG_CAP bits that KVM_X86_SETUP_MCE accepts (KVM_X86_GET_MCE_CAP_SUPPORTED)."""
FREE_BITS = 0xFF | 0xFF << 16
"""MCG_CAP fields that it takes as they are: the number of banks, and of extended state registers."""

BANKS = range(IA32_MC0_CTL, IA32_MC0_CTL + 4 * MAX_BANKS)
BANKS_CTL2 = range(IA32_MC0_CTL2, IA32_MC0_CTL2 + MAX_BANKS)
_ALL_ONES = (1 << 64) - 1
_CTL, _STATUS = 0, 1
STATUS_VALID, STATUS_OVERFLOW, STATUS_UNCORRECTED = 1 << 63, 1 << 62, 1 << 61
_STATUS_CONTEXT_CORRUPT, _STATUS_SIGNALLED, _STATUS_ACTION_REQUIRED = 1 << 57, 1 << 56, 1 << 55
_MCG_STATUS_IN_PROGRESS = 1 << 2
_GART_WORKAROUND = 1 << 10 | 1 << 0  # bits of a CTL register that guests clear although all or none should be set


class Effect(Enum):
    """What the CPU does about an error."""

    NOTHING = "the bank tells of it, or not even that"
    EXCEPTION = "#MC"
    SHUTDOWN = "an error in the middle of #MC, or with CR4.MCE clear"


class MachineCheck:
    """The machine check MSRs of one vCPU."""

    def __init__(self) -> None:
        """KVM's default banks, all enabled."""
        self._global = {IA32_MCG_STATUS: 0, IA32_MCG_CTL: _ALL_ONES}
        self._banks: list[int] = []
        self._ctl2: list[int] = []
        self.capabilities = 0
        self.setup(DEFAULT_BANKS)

    def setup(self, capabilities: int) -> None:
        """KVM_X86_SETUP_MCE: MCG_CAP, the number of banks in its low byte; the caller has checked it."""
        self.capabilities = capabilities
        count = capabilities & 0xFF
        self._global[IA32_MCG_CTL] = _ALL_ONES if capabilities & CAP_CTL else 0
        self._banks = [_ALL_ONES, 0, 0, 0] * count
        self._ctl2 = [0] * count

    def read(self, index: int, host_initiated: bool) -> int | None:
        """A register's value, None if it does not exist."""
        if index == IA32_MCG_CAP:
            return self.capabilities
        if index == IA32_MCG_STATUS:
            return self._global[index]
        if index == IA32_MCG_CTL:
            return self._global[index] if self.capabilities & CAP_CTL or host_initiated else None
        if index in BANKS:
            number = index - IA32_MC0_CTL
            return self._banks[number] if number < len(self._banks) else None
        number = index - IA32_MC0_CTL2
        exists = number < len(self._ctl2) and (self.capabilities & CAP_CMCI or host_initiated)
        return self._ctl2[number] if exists else None

    def write(self, index: int, value: int, host_initiated: bool, status_writable: bool) -> bool:
        """Store a value; False if the register does not exist or refuses it. `status_writable` is AMD's HWCR.McStatusWrEn."""
        if index == IA32_MCG_STATUS:
            self._global[index] = value
            return True
        if index == IA32_MCG_CTL:
            if value not in (0, _ALL_ONES) or (not self.capabilities & CAP_CTL and (value or not host_initiated)):
                return False
            self._global[index] = value
            return True
        if index in BANKS:
            return self._write_bank(index - IA32_MC0_CTL, value, host_initiated or status_writable)
        if index in BANKS_CTL2:  # there is no CMCI to configure
            return index - IA32_MC0_CTL2 < len(self._ctl2) and host_initiated and value == 0
        return False

    def _write_bank(self, number: int, value: int, any_status: bool) -> bool:
        if number >= len(self._banks):
            return False
        if number & 3 == _CTL and value not in (0, _ALL_ONES) and value | _GART_WORKAROUND != _ALL_ONES:
            return False
        if number & 3 == _STATUS and value and not any_status:
            return False
        self._banks[number] = value
        return True

    def report(self, event: X86Mce, enabled: bool) -> Effect:
        """The hardware has an error; `enabled` is CR4.MCE. OSError(EINVAL) for a bank that there is not, or a status that is not valid."""
        first = 4 * event.bank
        if first >= len(self._banks) or not event.status & STATUS_VALID:
            raise OSError(errno.EINVAL, "no such bank, or a status that is not valid")
        old = self._banks[first + _STATUS]
        needs_action = event.mcg_status or event.status & (_STATUS_CONTEXT_CORRUPT | _STATUS_SIGNALLED | _STATUS_ACTION_REQUIRED)
        if not event.status & STATUS_UNCORRECTED:
            if old & STATUS_VALID and old & STATUS_UNCORRECTED:  # the worse one stays
                self._banks[first + _STATUS] |= STATUS_OVERFLOW
            else:
                self._log(event, old)
            return Effect.NOTHING
        if not needs_action:
            self._log(event, 0)
            self._global[IA32_MCG_STATUS] = 0
            return Effect.NOTHING
        reported = not self.capabilities & CAP_CTL or self._global[IA32_MCG_CTL] == _ALL_ONES
        if not reported or self._banks[first + _CTL] != _ALL_ONES:
            return Effect.NOTHING
        if self._global[IA32_MCG_STATUS] & _MCG_STATUS_IN_PROGRESS or not enabled:
            return Effect.SHUTDOWN
        self._log(event, old)
        self._global[IA32_MCG_STATUS] = event.mcg_status
        return Effect.EXCEPTION

    def _log(self, event: X86Mce, old: int) -> None:
        first = 4 * event.bank
        overflow = STATUS_OVERFLOW if old & STATUS_VALID else 0
        self._banks[first + 1 : first + 4] = event.status | overflow, event.addr, event.misc
