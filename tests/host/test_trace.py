"""Tracepoints: silent until somebody listens, and silent again afterwards; with the kernel's names, fields and text."""

from __future__ import annotations

import errno

import pytest

from softkvm.host import trace
from softkvm.host.call import SYS_IOCTL
from softkvm.host.task import Task
from softkvm.uapi import svm, vmx
from tests.host.doubles import NMI, File, nothing


def test_tracepoints_are_off_until_somebody_listens() -> None:
    hits: list[tuple[int, tuple[int, ...]]] = []

    def probe(nr: int, args: tuple[int, ...]) -> None:
        hits.append((nr, args))

    file = File()
    assert not trace.sys_enter.enabled
    trace.sys_enter.register(probe)
    assert trace.sys_enter.enabled
    file.call(Task(), nothing, 7, command=NMI)
    trace.sys_enter.unregister(probe)
    assert not trace.sys_enter.enabled
    file.call(Task(), nothing)
    assert hits == [(SYS_IOCTL, (file.fd, NMI, 7, 0, 0, 0))]


def test_points_are_registered_by_name_and_refuse_strangers() -> None:
    assert trace.registry["kvm_exit"] is trace.kvm_exit
    with pytest.raises(ValueError, match="not in list"):
        trace.kvm_exit.unregister(print)


def test_every_point_prints_as_many_fields_as_it_has() -> None:
    for point in trace.registry.values():
        assert point.print.__code__.co_argcount == len(point.fields), point.name


@pytest.mark.parametrize(
    ("point", "values", "text"),
    [
        (trace.sys_enter, (16, (4, 0xAE80, 0, 0, 0, 0)), "NR 16 (4, ae80, 0, 0, 0, 0)"),
        (trace.sys_exit, (16, -4), "NR 16 = -4"),
        (trace.kvm_entry, (0, 0xFFF0), "vcpu 0, rip 0xfff0"),
        (
            trace.kvm_exit,
            (vmx.ExitReason.IO_INSTRUCTION, 0x1000, trace.ISA_VMX, 0x3F80000, 0, 0, 0, 1),
            "vcpu 1 reason IO_INSTRUCTION rip 0x1000 info1 0x0000000003f80000 info2 0x0000000000000000 "
            "intr_info 0x00000000 error_code 0x00000000",
        ),
        (trace.kvm_userspace_exit, (2, 0), "reason KVM_EXIT_IO (2)"),
        (trace.kvm_userspace_exit, (2, -errno.EINTR), "reason restart (4)"),
        (trace.kvm_userspace_exit, (2, -errno.EFAULT), "reason error (14)"),
        (trace.kvm_pio, (1, 0x3F8, 1, 1, 0x41), "pio_write at 0x3f8 size 1 count 1 val 0x41 "),
        (trace.kvm_pio, (0, 0x1F0, 2, 8, 0), "pio_read at 0x1f0 size 2 count 8 val 0x0 (...)"),
        (trace.kvm_mmio, (trace.MMIO_WRITE, 4, 0xFEE000B0, 0), "mmio write len 4 gpa 0xfee000b0 val 0x0"),
        (trace.kvm_msr, (True, 0x4B564D01, 0x1001, False), "msr_write 4b564d01 = 0x1001"),
        (trace.kvm_msr, (False, 0x1234, 0, True), "msr_read 1234 = 0x0 (#GP)"),
        (trace.kvm_cpuid, (1, 0, 0x50657, 8, 0, 0, True, False), "func 1 idx 0 rax 50657 rbx 8 rcx 0 rdx 0, cpuid entry found"),
        (
            trace.kvm_cpuid,
            (0x4FFF, 0, 0, 0, 0, 0, False, True),
            "func 4fff idx 0 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry not found, used max basic",
        ),
        (trace.kvm_inj_virq, (0x30, False, True), "IRQ 0x30 [reinjected]"),
        (trace.kvm_inj_exception, (14, True, 2, False), "#PF (0x2)"),
        (trace.kvm_page_fault, (0, 0x1000, 0xB8000, 2), "vcpu 0 rip 0x1000 address 0x00000000000b8000 error_code 0x2"),
        (trace.kvm_cr, (1, 8, 2), "cr_write 8 = 0x2"),
        (trace.kvm_cr, (0, 8, 2), "cr_read 8 = 0x2"),
        (trace.kvm_emulate_insn, (0x10000, 0, 2, 9, b"\x0f\xa2\x90", False), "0:10000:0f a2 (prot64)"),
        (trace.kvm_emulate_insn, (0xFFF0, 0xFFFF0000, 1, 0, b"\xf4", True), "ffff0000:fff0:f4 (real) failed"),
        (trace.kvm_smm_transition, (1, 0x30000, True), "vcpu 1: entering SMM, smbase 0x30000"),
        (trace.kvm_hypercall, (5, 1, 2, 0, 0), "nr 0x5 a0 0x1 a1 0x2 a2 0x0  a3 0x0"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_text_is_the_kernels(point: trace.Tracepoint, values: tuple[object, ...], text: str) -> None:
    assert point.print(*values) == text


def test_exit_reasons_have_the_vendors_names() -> None:
    svm_exit = trace.kvm_exit.print(svm.ExitCode.NPF, 0, trace.ISA_SVM, 0, 0, 0, 0, 0)
    assert "reason NPF " in svm_exit or "reason npf " in svm_exit
    assert "reason INVALID_STATE FAILED_VMENTRY " in trace.kvm_exit.print(0x8000_0021, 0, trace.ISA_VMX, 0, 0, 0, 0, 0)
    assert "reason 0x7f " in trace.kvm_exit.print(0x7F, 0, trace.ISA_VMX, 0, 0, 0, 0, 0)
