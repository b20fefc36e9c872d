//! The nested page table.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use softkvm_engine::memory::nested::{NestedError, NestedPageTable as Table};

use crate::memory::Memory;

/// Rights that exist: read, write, execute; and stores that leave memory as it is.
const RIGHTS: u8 = 15;

/// Guest-physical to host memory with rights per page. A change is in force on every core when the call returns.
///
/// All methods raise ValueError for a range that does not fit, and those that change the table for one that is not made of pages.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct NestedPageTable {
    pub table: Arc<Table>,
}

#[pymethods]
impl NestedPageTable {
    #[new]
    fn new() -> Self {
        NestedPageTable { table: Arc::default() }
    }

    /// Maps `[gpa, gpa + size)` to `memory` from `offset` on; `rights` is the sum of 1 read, 2 write, 4 execute, and 8 for
    /// stores that leave memory as it is.
    fn map(&self, py: Python<'_>, gpa: u64, size: u64, memory: &Memory, offset: u64, rights: u8) -> PyResult<()> {
        check_rights(rights)?;
        let region = &memory.region;
        py.detach(|| self.table.map(gpa, size, region, offset, rights)).map_err(value_error)
    }

    /// Says that `[gpa, gpa + size)` is a device's: an instruction that reads or writes there leaves the guest with `EXIT_ACCESS` at once.
    fn map_device(&self, py: Python<'_>, gpa: u64, size: u64) -> PyResult<()> {
        py.detach(|| self.table.map_device(gpa, size)).map_err(value_error)
    }

    /// Removes `[gpa, gpa + size)`.
    fn unmap(&self, py: Python<'_>, gpa: u64, size: u64) -> PyResult<()> {
        py.detach(|| self.table.unmap(gpa, size)).map_err(value_error)
    }

    /// Sets the rights of what is mapped in `[gpa, gpa + size)`.
    fn protect(&self, py: Python<'_>, gpa: u64, size: u64, rights: u8) -> PyResult<()> {
        check_rights(rights)?;
        py.detach(|| self.table.protect(gpa, size, rights)).map_err(value_error)
    }

    /// Tells the cores that the host wrote `[gpa, gpa + size)`, so that they drop the code that they made from it. No multiples of pages.
    fn wrote(&self, py: Python<'_>, gpa: u64, size: u64) -> PyResult<()> {
        py.detach(|| self.table.wrote(gpa, size)).map_err(value_error)
    }

    /// Adds and removes hidden breakpoints by guest-physical address: a core leaves the guest before the instruction that begins there.
    fn set_breakpoints(&self, py: Python<'_>, add: Vec<u64>, remove: Vec<u64>) {
        py.detach(|| self.table.set_breakpoints(&add, &remove));
    }

    /// Host address of the byte at `gpa` and the rights of its page, or None.
    fn lookup(&self, gpa: u64) -> Option<(u64, u8)> {
        self.table.lookup(gpa).map(|leaf| (leaf.host + gpa % 4096, leaf.rights))
    }
}

fn check_rights(rights: u8) -> PyResult<()> {
    if rights & !RIGHTS != 0 {
        return Err(PyValueError::new_err(format!("{rights:#x} is not a sum of the rights 1, 2, 4 and 8")));
    }
    Ok(())
}

fn value_error(error: NestedError) -> PyErr {
    PyValueError::new_err(match error {
        NestedError::Unaligned => "addresses and sizes must be positive multiples of 4096",
        NestedError::OutOfRange => "the range leaves guest-physical space or the memory",
    })
}
