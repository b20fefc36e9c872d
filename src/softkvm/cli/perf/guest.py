"""What a sampler knows of a guest: the task that a CPU runs, what the task has mapped, and the bytes of the mapped files.

All of it is read from guest memory by `softkvm.vmi.linux`, at the moment of a sample, when the CPU stands still. Source of truth: Linux 6.1
`include/linux/fs.h` and `mm_types.h` (the page cache of a file), `include/asm-generic/memory_model.h` (from a page's structure to its
memory).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from softkvm.kvm import Vm
from softkvm.vmi.errors import KernelNotFound, Unreadable, VmiError
from softkvm.vmi.linux import kernel as kernels
from softkvm.vmi.linux import maps, tasks
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.memory import Memory, Range

_PAGE = 4096
_LARGEST_FILE = 64 << 20
_ATTEMPTS = 50
"""Samples that may look for a kernel in vain: early in the boot there is none."""


class VmMemory:
    """The memory of a VM of this process, as `softkvm.vmi` reads it."""

    def __init__(self, vm: Vm) -> None:
        """Through the VM's memory slots."""
        self._mmu = vm.mmu

    def read(self, address: int, size: int) -> bytes:
        """As `Memory.read()`."""
        try:
            return self._mmu.read(address, size)
        except OSError:
            raise Unreadable(address) from None

    def ranges(self) -> list[Range]:
        """As `Memory.ranges()`."""
        return [Range(start, end) for start, end in self._mmu.slots.ranges]


@dataclass
class Process:
    """One program in one address space; an exec begins a new one."""

    pid: int
    name: str
    areas: list[maps.Area] = field(default_factory=list)
    """Its executable areas."""

    def area(self, address: int) -> maps.Area | None:
        """The executable area at an address."""
        return next((area for area in self.areas if area.start <= address < area.end), None)


class GuestView:
    """The processes of a guest, as far as samples have met them."""

    def __init__(self, memory: Memory, cache: Path | None) -> None:
        """Decoded symbols of kernels are kept in `cache`."""
        self._memory = memory
        self._cache = cache
        self._attempts = 0
        self.kernel: Kernel | None = None
        self._processes: dict[tuple[int, int, str], Process] = {}
        self._unmapped: set[tuple[int, int]] = set()
        self.files: dict[str, bytes] = {}
        """Contents of mapped programs and libraries, by path."""

    def find_kernel(self, cr3: int) -> Kernel | None:
        """The guest's kernel; None before it is far enough."""
        if self.kernel is None and self._attempts < _ATTEMPTS:
            self._attempts += 1
            try:
                self.kernel = kernels.find(self._memory, cr3, cache=self._cache)
            except KernelNotFound:
                return None
        return self.kernel

    def process(self, cpu: int, cr3: int, address: int | None) -> Process | None:
        """What CPU `cpu` runs; `address` is where it is in user mode. None before there is a kernel that says so."""
        kernel = self.find_kernel(cr3)
        if kernel is None:
            return None
        try:
            return self._process(kernel, cpu, address)
        except VmiError:  # the kernel is about to change what we read
            return None

    def _process(self, kernel: Kernel, cpu: int, address: int | None) -> Process:
        kernel.forget()
        task = tasks.current(kernel, cpu)
        pid, memory, name = task.number("tgid"), task.number("mm"), task.text("comm")
        process = self._processes.get((pid, memory, name))
        if process is None:
            process = self._processes[pid, memory, name] = Process(pid, name)
        if address is not None and process.area(address) is None and (pid, address >> 12) not in self._unmapped:
            process.areas = [area for area in maps.maps(kernel, task) if "x" in area.rights]
            self._read_files(kernel, task, process)
            if process.area(address) is None:
                self._unmapped.add((pid, address >> 12))
        return process

    @property
    def processes(self) -> list[Process]:
        """All of them, in the order of their first samples."""
        return list(self._processes.values())

    # --- Files ----------------------------------------------------------------------------------------------------------------------

    def _read_files(self, kernel: Kernel, task: Struct, process: Process) -> None:
        memory = task.follow("mm")
        if memory is None:
            return
        wanted = {area.start: area.name for area in process.areas if area.name.startswith("/") and area.name not in self.files}
        for area in maps.areas(kernel, memory) if wanted else ():
            name, file = wanted.get(area.number("vm_start")), area.follow("vm_file")
            if name is not None and file is not None:
                self.files[name] = page_cache(kernel, file)


def page_cache(kernel: Kernel, file: Struct) -> bytes:
    """The bytes of a file as far as the guest holds them in memory: all of them on tmpfs, where an initramfs lives. Holes are zeros."""
    mapping, inode = file.follow("f_mapping"), file.follow("f_inode")
    if mapping is None or inode is None:
        return b""
    size = min(inode.number("i_size"), _LARGEST_FILE)
    data = bytearray(size)
    vmemmap = kernel.number(kernel.symbols["vmemmap_base"])
    structure = kernel.types.size(kernel.types.find("page").number)
    for index, page in kernel.xarray(mapping.at("i_pages")):
        start = index * _PAGE
        if page & 1 or start >= size:  # a value in place of a page: it is swapped out
            continue
        content = kernel.memory.read((page - vmemmap) // structure * _PAGE, _PAGE)
        data[start : start + _PAGE] = content[: size - start]
    return bytes(data)
