//! A control block, and a guest that runs on a whole core as a hypervisor runs it.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::sync::Arc;

use softkvm_engine::memory::nested::{right, NestedPageTable};
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, rflags, rights, seg, Segment};
use softkvm_engine::virt::control::Block;
use softkvm_engine::virt::entry::Core;

use super::{CODE, RAM_SIZE, STACK_TOP};

/// A control block in memory of its own.
pub struct OwnedBlock(*mut Block);

impl OwnedBlock {
    pub fn new() -> Self {
        // SAFETY: `Block` is not zero-sized.
        let block = unsafe { alloc_zeroed(Layout::new::<Block>()) }.cast::<Block>();
        assert!(!block.is_null());
        OwnedBlock(block)
    }

    pub fn get(&mut self) -> &mut Block {
        // SAFETY: allocated in `new`, zeroes are a valid block, and `&mut self` makes it exclusive.
        unsafe { &mut *self.0 }
    }
}

impl Drop for OwnedBlock {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.0.cast(), Layout::new::<Block>()) };
    }
}

/// A core with a guest in flat 32-bit protected mode at [`CODE`].
pub struct Guest {
    core: Core,
    block: OwnedBlock,
    npt: Arc<NestedPageTable>,
    ram: Arc<Region>,
}

impl Guest {
    pub fn new(code: &[u8]) -> Self {
        let ram = Arc::new(Region::new(RAM_SIZE).expect("a memfd"));
        let npt = NestedPageTable::default();
        npt.map(0, RAM_SIZE as u64, &ram, 0, right::READ | right::WRITE | right::EXECUTE).expect("an aligned range");
        let mut guest = Guest { core: Core::new(Arc::new(Model::default()), 0), block: OwnedBlock::new(), npt: Arc::new(npt), ram };
        guest.poke(CODE, code);
        let state = &mut guest.block().state;
        let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::DB | rights::GRANULARITY;
        for number in 0..6 {
            let kind = if number == seg::CS { rights::CODE } else { 0 };
            state.segments[number] = Segment::new(8, data | kind, u32::MAX, 0);
        }
        state.cr0 = cr0::ET | cr0::PE | cr0::NE;
        (state.rip, state.gpr[4], state.rflags) = (CODE, STACK_TOP, rflags::FIXED);
        guest
    }

    pub fn block(&mut self) -> &mut Block {
        self.block.get()
    }

    /// Writes guest-physical memory.
    pub fn poke(&mut self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= RAM_SIZE);
        // SAFETY: inside the region, by the test above.
        unsafe { self.ram.start().add(gpa as usize).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Runs up to a VM exit; its reason.
    pub fn enter(&mut self) -> u32 {
        // SAFETY: the block is ours and nobody else uses it.
        unsafe { self.core.enter(self.block.get(), &self.npt) }
    }
}
