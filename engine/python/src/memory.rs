//! Guest RAM with the buffer protocol.

use std::ffi::c_int;
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use softkvm_engine::memory::region::Region;

/// Guest RAM: `size` bytes of zeroed shared memory, page aligned, writable through the buffer protocol.
///
/// Raises ValueError for a size that is not a positive multiple of 4096, OSError where the host has no such memory.
#[pyclass(frozen, weakref, module = "softkvm._engine")]
pub struct Memory {
    pub region: Arc<Region>,
}

#[pymethods]
impl Memory {
    #[new]
    fn new(py: Python<'_>, size: i64) -> PyResult<Self> {
        let bytes = usize::try_from(size).ok().filter(|bytes| *bytes > 0 && bytes % 4096 == 0);
        let bytes = bytes.ok_or_else(|| PyValueError::new_err(format!("{size} bytes is not a positive multiple of 4096")))?;
        Ok(Memory { region: Arc::new(Region::new(bytes).map_err(|error| os_error(py, error))?) })
    }

    /// Descriptor of the memfd behind the memory.
    #[getter]
    fn fd(&self) -> i32 {
        self.region.fd()
    }

    /// Size in bytes.
    #[getter]
    fn size(&self) -> usize {
        self.region.size()
    }

    /// Host virtual address of the first byte.
    #[getter]
    fn address(&self) -> usize {
        self.region.start() as usize
    }

    /// Bytes that have been touched.
    fn resident(&self, py: Python<'_>) -> PyResult<u64> {
        self.region.resident().map_err(|error| os_error(py, error))
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (start, size) = (slf.get().region.start(), slf.get().region.size());
        // SAFETY: Python passes a valid view, and the region stays mapped as long as the object that the view holds.
        unsafe { fill_view(slf.as_any(), start, size, view, flags) }
    }
}

/// Answers a request for a view of `[start, start + size)`, writable bytes that belong to `owner`.
///
/// # Safety
/// `view` must be valid for writes, and the bytes must stay valid for as long as `owner` lives.
pub unsafe fn fill_view(owner: &Bound<'_, PyAny>, start: *mut u8, size: usize, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
    const WRITABLE: c_int = 0;
    // SAFETY: by the caller's promise; the call takes its own reference to the owner, which keeps the bytes alive with the view.
    if unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), start.cast(), size as ffi::Py_ssize_t, WRITABLE, flags) } < 0 {
        return Err(PyErr::fetch(owner.py()));
    }
    Ok(())
}

fn os_error(py: Python<'_>, error: std::io::Error) -> PyErr {
    let Some(errno) = error.raw_os_error() else { return error.into() };
    match py.import("os").and_then(|os| os.call_method1("strerror", (errno,))) {
        Ok(text) => PyOSError::new_err((errno, text.unbind())),
        Err(failure) => failure,
    }
}
