//! The instruction tables of `tests/insn`, run by every tier of the engine: reference handlers one by one, blocks
//! of fast ones, and blocks as host code.
//!
//! `SOFTKVM_INSN_WRITE` names a folder to which the tables of the user worlds are written from what the host's CPU does (`make insn-tables`).
//! Only x86-64 hosts can write tables, and every host runs them.

#[allow(dead_code)] // the differential test uses the rest
#[path = "../differential/arena.rs"]
mod arena;
#[path = "../common/mod.rs"]
mod common;
#[cfg(target_arch = "x86_64")]
#[path = "../differential/encode.rs"]
mod encode;
#[cfg(target_arch = "x86_64")]
#[allow(dead_code)] // the differential test uses the rest
#[path = "../differential/explained.rs"]
mod explained;
#[cfg(target_arch = "x86_64")]
#[path = "../differential/forms.rs"]
mod forms;
#[path = "../differential/guest.rs"]
mod guest;
#[cfg(target_arch = "x86_64")]
#[allow(dead_code)] // the same
#[path = "../differential/host.rs"]
mod host;
#[allow(dead_code)] // the same
#[path = "../differential/image.rs"]
mod image;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // who writes tables uses the rest
#[path = "../differential/mode.rs"]
mod mode;
#[cfg(target_arch = "x86_64")]
#[path = "../differential/values.rs"]
mod values;

mod system;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the same
mod table;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // the same
mod user;
#[cfg(target_arch = "x86_64")]
mod write;

use std::path::{Path, PathBuf};

use guest::Guest;
use table::{items, Case, State};

/// Ways in which the engine runs instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Reference,
    Block,
    Translated,
}

impl Tier {
    const ALL: [Tier; 3] = [Tier::Reference, Tier::Block, Tier::Translated];
}

const DESCRIBED: usize = 20;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/insn")
}

fn tables() -> Vec<Case> {
    let mut paths: Vec<_> = std::fs::read_dir(folder()).expect("tests/insn").map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "ins"));
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        table::read(&name, &std::fs::read_to_string(path).expect("a text file"))
    };
    paths.iter().flat_map(read).collect()
}

fn check(case: &Case, tier: Tier, found: &State, wanted: &State, failures: &mut Vec<String>) {
    if found != wanted {
        let code: String = case.code.iter().map(|byte| format!("{byte:02x}")).collect();
        let difference = items(wanted, found);
        let rips = (found.image.rip, wanted.image.rip);
        failures.push(format!(
            "{} {tier:?} {code}: {difference} (the engine's values); rip {rips:x?}; faults {:x?} and in the table {:x?}",
            case.place, found.image.fault, wanted.image.fault
        ));
    }
}

fn finish(count: usize, failures: &[String]) {
    assert!(count > 0, "no table has cases");
    let shown = failures.iter().take(DESCRIBED).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {count} cases fail:\n{shown}", failures.len());
}

/// Whether the engine computes floating point in software.
const IN_SOFTWARE: bool = cfg!(any(feature = "soft-float", not(target_arch = "x86_64")));

/// Whether a case is of an instruction whose vendors bound the error and do not tell the result.
fn approximates(case: &Case) -> bool {
    use iced_x86::Mnemonic::*;
    let bits = if case.world == "user64" { 64 } else { 32 };
    let insn = iced_x86::Decoder::new(bits, &case.code, iced_x86::DecoderOptions::NONE).decode();
    matches!(insn.mnemonic(), Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss)
}

#[test]
fn instructions_of_a_process_do_what_the_tables_say() {
    #[cfg(target_arch = "x86_64")]
    if let Some(folder) = std::env::var_os("SOFTKVM_INSN_WRITE") {
        write::write(Path::new(&folder));
    }
    let (mut failures, mut count) = (Vec::new(), 0);
    let cases = tables();
    for (world, size) in user::WORLDS {
        let mode = user::mode(size);
        for tier in Tier::ALL {
            let guest = Guest::new(user::model(), mode);
            let mut guest = if tier == Tier::Translated { guest.translated() } else { guest };
            for case in cases.iter().filter(|case| case.world == world && !(IN_SOFTWARE && approximates(case))) {
                let (found, wanted) = user::run(&mut guest, mode, case, tier);
                check(case, tier, &found, &wanted, &mut failures);
                count += 1;
            }
        }
    }
    finish(count, &failures);
}

#[test]
fn instructions_of_a_kernel_do_what_the_tables_say() {
    let (mut failures, mut count) = (Vec::new(), 0);
    for case in tables().iter().filter(|case| !case.world.starts_with("user")) {
        for tier in Tier::ALL {
            let (found, wanted) = system::run(case, tier);
            check(case, tier, &found, &wanted, &mut failures);
            count += 1;
        }
    }
    finish(count, &failures);
}
