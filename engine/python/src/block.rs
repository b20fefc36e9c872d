//! The control block's memory.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::ffi::c_int;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::ffi;
use pyo3::prelude::*;
use softkvm_engine::virt::control::{Block, BLOCK_SIZE};

use crate::memory::fill_view;

/// Memory of a control block: zeroed, page aligned, laid out as `softkvm.silicon.control.ControlBlock`.
#[pyclass(frozen, module = "softkvm._engine")]
pub struct ControlBlock {
    block: NonNull<Block>,
    entered: AtomicBool,
}

// SAFETY: the block is plain memory on the heap; all access goes through raw pointers, and `claim` keeps cores apart.
unsafe impl Send for ControlBlock {}
// SAFETY: as above.
unsafe impl Sync for ControlBlock {}

#[pymethods]
impl ControlBlock {
    #[new]
    fn new() -> Self {
        let layout = Layout::new::<Block>();
        // SAFETY: the layout has a size, and zeroes are a valid block.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(block) = NonNull::new(start.cast()) else { handle_alloc_error(layout) };
        ControlBlock { block, entered: AtomicBool::new(false) }
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let start = slf.get().block.as_ptr().cast();
        // SAFETY: Python passes a valid view, and the block lives as long as the object that the view holds.
        unsafe { fill_view(slf.as_any(), start, BLOCK_SIZE, view, flags) }
    }
}

impl ControlBlock {
    /// Takes the block for one core, or `None` while another core runs on it.
    pub fn claim(&self) -> Option<Claim<'_>> {
        let free = self.entered.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        free.then_some(Claim(self))
    }

    /// The block; valid as long as `self`.
    pub fn as_ptr(&self) -> *mut Block {
        self.block.as_ptr()
    }
}

impl Drop for ControlBlock {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout; every view holds a reference to the object, so none is left.
        unsafe { dealloc(self.block.as_ptr().cast(), Layout::new::<Block>()) };
    }
}

/// The right to run on a block, until dropped.
pub struct Claim<'a>(&'a ControlBlock);

impl Claim<'_> {
    /// The claimed block.
    pub fn as_ptr(&self) -> *mut Block {
        self.0.as_ptr()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.entered.store(false, Ordering::Release);
    }
}
