"""SVM exit codes. Answers to APM vol. 2, app. C; the names are those of Linux 6.1 `asm/svm.h`, which perf and trace users know."""

from enum import IntEnum


class ExitCode(IntEnum):
    """EXITCODE of the VMCB, low half. The first ones of each kind of register and exception stand for all: number n is n further."""

    READ_CR0 = 0x00
    WRITE_CR0 = 0x10
    READ_DR0 = 0x20
    WRITE_DR0 = 0x30
    EXCP_BASE = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_COND = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    INVPCID = 0xA2
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_UNACCELERATED_ACCESS = 0x402
    VMGEXIT = 0x403
    INVALID = 0xFFFF_FFFF


EXIT_NAMES = {
    **{ExitCode.READ_CR0 + number: f"READ_CR{number}" for number in range(16)},
    **{ExitCode.WRITE_CR0 + number: f"WRITE_CR{number}" for number in range(16)},
    **{ExitCode.READ_DR0 + number: f"READ_DR{number}" for number in range(8)},
    **{ExitCode.WRITE_DR0 + number: f"WRITE_DR{number}" for number in range(8)},
    **{ExitCode.EXCP_BASE + vector: f"EXCP_{vector}" for vector in range(32)},
    **{int(code): code.name for code in ExitCode if code >= ExitCode.INTR},
}
"""Exit codes as a core returns them."""
