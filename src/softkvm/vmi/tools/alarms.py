"""Alarms: a program is executed, a module is loaded, a process gains rights.

Source of truth: Linux 6.1 `fs/exec.c` (`finalize_exec()`: the new program is in place, its arguments are on its stack),
`kernel/module/main.c` (`do_init_module()`: the module is complete and its init function is next), `kernel/cred.c` (`commit_creds()`).
"""

from __future__ import annotations

import msgspec

from softkvm.vmi.events import HiddenBreakpointEvent
from softkvm.vmi.linux import tasks
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.target import Target
from softkvm.vmi.tools.dispatch import Dispatcher


class Executed(msgspec.Struct, frozen=True, tag="exec", tag_field="alarm"):
    """A process runs a new program."""

    pid: int
    ppid: int
    uid: int
    path: str
    arguments: tuple[str, ...]


class ModuleLoaded(msgspec.Struct, frozen=True, tag="module", tag_field="alarm"):
    """A module is about to be initialized."""

    pid: int
    process: str
    module: str
    taints: int


class CredentialsChanged(msgspec.Struct, frozen=True, tag="credentials", tag_field="alarm"):
    """A process gets other identities; `gained` if they are root's and were not, or have capabilities that it had not."""

    pid: int
    process: str
    uid: int
    new_uid: int
    euid: int
    new_euid: int
    gained: bool


Alarm = Executed | ModuleLoaded | CredentialsChanged


class Alarms(Dispatcher[Alarm]):
    """Notes executed programs and, unless told otherwise, modules and credentials."""

    def __init__(self, target: Target, *, modules: bool = True, credentials: bool = True) -> None:
        super().__init__(target)
        symbols = target.kernel.symbols
        self.at(symbols["finalize_exec"], self._execute)
        if modules:
            self.at(symbols["do_init_module"], self._load)
        if credentials:
            self.at(symbols["commit_creds"], self._commit)

    def _execute(self, event: HiddenBreakpointEvent) -> None:
        task = self.target.task(event)
        if task is None:
            return
        program = self.target.kernel.struct("linux_binprm", event.regs.rdi)
        parent, memory, cred = task.follow("real_parent"), task.follow("mm"), task.follow("cred")
        self.note(
            Executed(
                pid=task.number("pid"),
                ppid=parent.number("tgid") if parent is not None else 0,
                uid=cred.number("uid.val") if cred is not None else 0,
                path=program.text("filename"),
                arguments=tasks.arguments(self.target.kernel, memory) if memory is not None else (),
            )
        )

    def _load(self, event: HiddenBreakpointEvent) -> None:
        task = self.target.task(event)
        module = self.target.kernel.struct("module", event.regs.rdi)
        pid, name = (task.number("pid"), task.text("comm")) if task is not None else (0, "")
        self.note(ModuleLoaded(pid, name, module.text("name"), module.number("taints")))

    def _commit(self, event: HiddenBreakpointEvent) -> None:
        task = self.target.task(event)
        old = task.follow("cred") if task is not None else None
        if task is None or old is None:
            return
        new = self.target.kernel.struct("cred", event.regs.rdi)
        before, after = _identity(old), _identity(new)
        if before != after:
            (uid, euid, could), (new_uid, new_euid, can) = before, after
            gained = bool(can & ~could) or (new_euid == 0 != euid)
            self.note(CredentialsChanged(task.number("pid"), task.text("comm"), uid, new_uid, euid, new_euid, gained))


def _identity(cred: Struct) -> tuple[int, int, int]:
    """Real and effective user, and effective capabilities."""
    return cred.number("uid.val"), cred.number("euid.val"), int.from_bytes(cred.bytes("cap_effective"), "little")
