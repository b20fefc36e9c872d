//! What CR0, CR3 and CR4 may hold and what follows from a change (SDM vol. 3, 2.5, 4.1 to 4.4, 4.10 and 10.8.5), and the exits of
//! control-register accesses.

use crate::cpu::Cpu;
use crate::memory::nested::right;
use crate::memory::PAGE_OFFSET;
use crate::model::Feature;
use crate::paging::AccessKind;
use crate::state::{cr0, cr4, efer, rights, seg};
use crate::uop::{Exec, Stop};
use crate::virt::exits::code;

/// Bits of CR0 that exist; the others are ignored.
const CR0_BITS: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
/// Bits of CR0 that translations depend on.
const CR0_TRANSLATION: u64 = cr0::PG | cr0::PE | cr0::WP;
/// Bits of CR0 whose change makes the CPU load the PDPTEs (SDM vol. 3, 4.4.1).
const CR0_PDPTES: u64 = cr0::PG | cr0::CD | cr0::NW;
/// Bits of CR4 that translations depend on.
const CR4_TRANSLATION: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS | cr4::LA57;
const CR4_PDPTES: u64 = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
/// Bits of CR4 that every model has.
const CR4_BASE: u64 = cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
/// Bits of CR4 that come with a feature.
const CR4_FEATURES: [(Feature, u64); 10] = [
    (Feature::Vme, cr4::VME | cr4::PVI),
    (Feature::Umip, cr4::UMIP),
    (Feature::La57, cr4::LA57),
    (Feature::Fsgsbase, cr4::FSGSBASE),
    (Feature::Pcid, cr4::PCIDE),
    (Feature::Xsave, cr4::OSXSAVE),
    (Feature::Smep, cr4::SMEP),
    (Feature::Smap, cr4::SMAP),
    (Feature::Pku, cr4::PKE),
    (Feature::Pks, cr4::PKS),
];
/// PCID field of CR3.
pub(super) const PCID: u64 = 0xfff;
/// PDPTE bits that must be zero besides the address bits that the CPU lacks.
const PDPTE_RESERVED: u64 = 0x1e6;

/// Kinds of accesses; the numbers are those of the exit qualification (SDM vol. 3, table 28-3).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Access {
    Write = 0,
    Read = 1,
    Clts = 2,
    Lmsw = 3,
}

/// The exit of an access to control register `number`. `register`: number of the general register of a MOV.
#[cold]
pub(super) fn intercept_control(cpu: &mut Cpu, number: u8, access: Access, register: u8) -> Stop {
    if cpu.model.is_amd() {
        let direction = if access == Access::Read { 0 } else { 0x10 };
        let moves = matches!(access, Access::Read | Access::Write);
        let info = if moves { 1 << 63 | u64::from(register) } else { 0 };
        return cpu.exit_number(code::CR_ACCESS.svm + direction + u32::from(number), info);
    }
    let qualification = u64::from(number) | (access as u64) << 4 | u64::from(register) << 8;
    cpu.exit(code::CR_ACCESS, qualification)
}

impl Cpu {
    /// Writes CR0: checks, paging on and off, and all that depends on it.
    pub(super) fn set_cr0(&mut self, value: u64) -> Exec {
        let new = value & CR0_BITS | cr0::ET;
        let old = self.state.cr0;
        let changed = old ^ new;
        self.check_cr0(value, new)?;
        let enters_long = changed & new & cr0::PG != 0 && self.state.efer & efer::LME != 0;
        if enters_long {
            self.check_long_entry()?;
        } else if new & cr0::PG != 0 && changed & CR0_PDPTES != 0 && !self.ia32e() && self.state.cr4 & cr4::PAE != 0 {
            self.load_pdptes(self.state.cr3)?;
        }
        if enters_long {
            self.state.efer |= efer::LMA;
        } else if new & cr0::PG == 0 {
            self.state.efer &= !efer::LMA;
        }
        self.state.cr0 = new;
        if changed & CR0_TRANSLATION != 0 {
            self.tlb.flush();
        }
        self.refresh();
        Ok(())
    }

    fn check_cr0(&mut self, value: u64, new: u64) -> Exec {
        let leaves_paging = new & cr0::PG == 0 && self.state.cr0 & cr0::PG != 0;
        let bad = value >> 32 != 0
            || new & cr0::PG != 0 && new & cr0::PE == 0
            || new & cr0::NW != 0 && new & cr0::CD == 0
            || leaves_paging && (self.long_mode() || self.state.cr4 & cr4::PCIDE != 0);
        if bad {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Whether paging may be turned on with EFER.LME set (SDM vol. 3, 10.8.5).
    fn check_long_entry(&mut self) -> Exec {
        let tss_16 = self.state.segments[seg::TR].access_rights & rights::TYPE & 0xd == 1;
        if self.state.cr4 & cr4::PAE == 0 || self.state.segments[seg::CS].has(rights::LONG) || tss_16 {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Writes CR4.
    pub(super) fn set_cr4(&mut self, new: u64) -> Exec {
        let old = self.state.cr4;
        let changed = old ^ new;
        let pcids_on = changed & new & cr4::PCIDE != 0;
        let bad = new & !self.cr4_bits() != 0
            || self.ia32e() && (new & cr4::PAE == 0 || changed & cr4::LA57 != 0)
            || pcids_on && (!self.ia32e() || self.state.cr3 & PCID != 0);
        if bad {
            return Err(self.general_protection());
        }
        let pae_paging = self.state.cr0 & cr0::PG != 0 && new & cr4::PAE != 0 && !self.ia32e();
        if pae_paging && changed & CR4_PDPTES != 0 {
            self.load_pdptes(self.state.cr3)?;
        }
        self.state.cr4 = new;
        if changed & CR4_TRANSLATION != 0 {
            self.tlb.flush();
            self.tlb.switch(self.pcid(), false);
        }
        self.refresh();
        Ok(())
    }

    fn cr4_bits(&self) -> u64 {
        let has = |(feature, _): &&(Feature, u64)| self.model.has(*feature);
        CR4_FEATURES.iter().filter(has).fold(CR4_BASE, |bits, (_, own)| bits | own)
    }

    /// PCID of the current address space, zero when PCIDs are off.
    pub(crate) fn pcid(&self) -> u16 {
        if self.state.cr4 & cr4::PCIDE != 0 {
            (self.state.cr3 & PCID) as u16
        } else {
            0
        }
    }

    /// Writes CR3; `keep` leaves the translations of the new PCID in place.
    pub(super) fn set_cr3(&mut self, value: u64, keep: bool) -> Exec {
        if value >> self.model.physical_bits() != 0 {
            return Err(self.general_protection());
        }
        if !self.ia32e() && self.state.cr0 & cr0::PG != 0 && self.state.cr4 & cr4::PAE != 0 {
            self.load_pdptes(value)?;
        }
        self.state.cr3 = value;
        self.paging.cr3 = value;
        self.tlb.switch(self.pcid(), keep);
        self.refresh_table();
        Ok(())
    }

    /// Loads the four PDPTEs of PAE paging from the table at `cr3`.
    fn load_pdptes(&mut self, cr3: u64) -> Exec {
        let reserved = PDPTE_RESERVED | !0 << self.model.physical_bits();
        let mut entries = [0; 4];
        for (n, entry) in entries.iter_mut().enumerate() {
            *entry = self.read_physical((cr3 & 0xffff_ffe0) + 8 * n as u64)?;
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(self.general_protection());
            }
        }
        self.state.pdpte = entries;
        self.paging.pdpte = entries;
        Ok(())
    }

    /// Reads an aligned quadword of guest-physical memory.
    fn read_physical(&mut self, gpa: u64) -> Exec<u64> {
        let leaf = self.npt.lookup(gpa);
        match leaf {
            Some(leaf) if leaf.rights & right::READ != 0 => {
                let host = (leaf.host + (gpa & PAGE_OFFSET)) as *const u64;
                // SAFETY: the nested page table keeps the region alive, and an aligned quadword does not leave its page.
                Ok(unsafe { host.read_volatile() })
            }
            _ => Err(self.exit_nested(gpa, None, AccessKind::Read, leaf.map_or(0, |leaf| leaf.rights), false)),
        }
    }
}
