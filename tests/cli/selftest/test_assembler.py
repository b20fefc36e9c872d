"""The assembler, judged by the encodings of SDM vol. 2."""

from collections.abc import Callable

import pytest

from softkvm.cli.selftest.assembler import Assembler


def assemble(bits: int, emit: Callable[[Assembler], None], base: int = 0x1000) -> str:
    asm = Assembler(base, bits)
    asm.label("start")
    emit(asm)
    return asm.finish().hex(" ")


@pytest.mark.parametrize(
    ("bits", "emit", "code"),
    [
        (16, lambda a: a.mov("eax", 1), "66 b8 01 00 00 00"),
        (32, lambda a: a.mov("edi", "start"), "bf 00 10 00 00"),
        (32, lambda a: a.load("ecx", 0x2000), "8b 0c 25 00 20 00 00"),
        (64, lambda a: a.store(0x2000, "ebx"), "89 1c 25 00 20 00 00"),
        (64, lambda a: a.store(0x2000, 5), "c7 04 25 00 20 00 00 05 00 00 00"),
        (64, lambda a: a.compare(0x2000, 5), "81 3c 25 00 20 00 00 05 00 00 00"),
        (16, lambda a: a.arithmetic("or", "eax", 1), "66 81 c8 01 00 00 00"),
        (32, lambda a: a.arithmetic("and", "eax", 0xFFFFFFFE), "81 e0 fe ff ff ff"),
        (32, lambda a: a.mov_to_cr(3), "0f 22 d8"),
        (32, lambda a: a.mov_from_cr(2), "0f 20 d0"),
        (32, lambda a: a.load_segments("ds", "ss"), "8e d8 8e d0"),
        (16, lambda a: a.load_table("lgdt", 0x1234), "66 0f 01 16 34 12"),
        (64, lambda a: a.load_table("lidt", 0x1234), "0f 01 1c 25 34 12 00 00"),
        (64, lambda a: a.invlpg(0x1000), "0f 01 3c 25 00 10 00 00"),
        (64, lambda a: a.push(8), "68 08 00 00 00"),
        (32, lambda a: a.call("start"), "e8 fb ff ff ff"),
        (16, lambda a: a.call("start"), "e8 fd ff"),
        (16, lambda a: a.jump("start", "z"), "74 fe"),
        (32, lambda a: a.jump("start", "nz"), "0f 85 fa ff ff ff"),
        (64, lambda a: a.jump("start"), "e9 fb ff ff ff"),
        (16, lambda a: a.far_jump(8, 0x100000), "66 ea 00 00 10 00 08 00"),
        (16, lambda a: a.far_jump(0, "start", size=2), "ea 00 10 00 00"),
        (64, lambda a: a.do("iretq", "lretq", "cpuid"), "48 cf 48 cb 0f a2"),
    ],
)
def test_encoding(bits: int, emit: Callable[[Assembler], None], code: str) -> None:
    assert assemble(bits, emit) == code


def test_labels_may_follow_their_use() -> None:
    asm = Assembler(0, 32)
    asm.jump("end")
    asm.org(16)
    asm.label("end")
    assert asm.finish()[:5] == bytes.fromhex("e9 0b 00 00 00")


def test_unknown_label_is_an_error() -> None:
    asm = Assembler(0, 32)
    asm.jump("nowhere")
    with pytest.raises(KeyError, match="nowhere"):
        asm.finish()
