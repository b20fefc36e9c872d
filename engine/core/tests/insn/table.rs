//! The text of instruction tables (`tests/insn/README.md` states the grammar), read and written.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::image::{Area, Fault, Image};

pub const GPR: [&str; 16] = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
pub const SEGMENTS: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];

/// Bytes of memory by address.
pub type Memory = BTreeMap<u64, u8>;

/// A state of the CPU and of memory.
#[derive(Clone, Default, PartialEq)]
pub struct State {
    pub image: Image,
    /// Selectors that the table names, by number of the segment register.
    pub selectors: BTreeMap<usize, u16>,
    pub memory: Memory,
}

/// One line: an instruction, what was before it and what is after it.
#[derive(Clone)]
pub struct Case {
    pub world: String,
    pub place: String,
    pub code: Vec<u8>,
    pub before: State,
    pub after: State,
    /// RIP after the instruction, if the line tells it.
    pub rip: Option<u64>,
    /// Flags that are not compared.
    pub undefined: u64,
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text} is not a hexadecimal number"))
}

fn bytes(text: &str) -> Vec<u8> {
    assert!(text.len() % 2 == 0, "half a byte in {text}");
    (0..text.len()).step_by(2).map(|n| number(&text[n..n + 2]) as u8).collect()
}

fn indexed(name: &str, prefix: &str) -> Option<usize> {
    name.strip_prefix(prefix)?.parse().ok()
}

/// Sets `place` to a number written with the most significant digit first.
fn set_bytes(place: &mut [u8], text: &str) {
    let value = bytes(text);
    assert_eq!(value.len(), place.len(), "{text} has another size");
    place.iter_mut().zip(value.iter().rev()).for_each(|(byte, value)| *byte = *value);
}

fn set_area(area: &mut Area, name: &str, text: &str) -> bool {
    match name {
        "fcw" => area.fcw = number(text) as u16,
        "fsw" => area.fsw = number(text) as u16,
        "ftw" => area.ftw = number(text) as u16,
        "mxcsr" => area.mxcsr = number(text) as u32,
        _ => {
            if let Some(n) = indexed(name, "st") {
                set_bytes(&mut area.st[n][..10], text);
            } else if let Some(n) = indexed(name, "xmm") {
                set_bytes(&mut area.xmm[n], text);
            } else if let Some(n) = indexed(name, "ymm") {
                set_bytes(&mut area.ymm_high[n], &text[..32]);
                set_bytes(&mut area.xmm[n], &text[32..]);
            } else {
                return false;
            }
        }
    }
    true
}

fn fault(text: &str) -> Fault {
    let (text, address) = text.split_once('@').map_or((text, 0), |(rest, address)| (rest, number(address)));
    let (vector, error) = text.split_once(':').map_or((text, 0), |(vector, error)| (vector, number(error)));
    Fault { vector: vector.parse().expect("the vector is a decimal number"), error: error as u32, address }
}

impl Case {
    fn item(state: &mut State, item: &str) -> (Option<u64>, u64) {
        let (name, text) = item.split_once('=').unwrap_or_else(|| panic!("{item} is not NAME=VALUE"));
        if let Some(n) = GPR.iter().position(|gpr| *gpr == name) {
            state.image.gpr[n] = number(text);
        } else if let Some(n) = SEGMENTS.iter().position(|segment| *segment == name) {
            state.selectors.insert(n, number(text) as u16);
        } else if let Some(address) = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
            let start = number(address);
            state.memory.extend(bytes(text).into_iter().enumerate().map(|(n, byte)| (start + n as u64, byte)));
        } else {
            match name {
                "flags" => state.image.rflags = number(text),
                "flags~" => return (None, number(text)),
                "rip" => return (Some(number(text)), 0),
                "fault" => state.image.fault = Some(fault(text)),
                _ => assert!(set_area(&mut state.image.area, name, text), "{name} is no part of the state"),
            }
        }
        (None, 0)
    }

    /// The case of a line `CODE | BEFORE | AFTER`.
    fn read(world: &str, place: String, line: &str) -> Case {
        let [code, before, after] = line.split('|').collect::<Vec<_>>()[..] else { panic!("{place}: not CODE | BEFORE | AFTER") };
        let code = bytes(&code.split_whitespace().collect::<String>());
        let mut start = State::default();
        for item in before.split_whitespace() {
            Case::item(&mut start, item);
        }
        let mut end = start.clone();
        let (mut rip, mut undefined) = (None, 0);
        for item in after.split_whitespace() {
            let (target, flags) = Case::item(&mut end, item);
            rip = rip.or(target);
            undefined |= flags;
        }
        Case { world: world.into(), place, code, before: start, after: end, rip, undefined }
    }
}

/// All cases of a table.
pub fn read(name: &str, text: &str) -> Vec<Case> {
    let mut world = String::new();
    let mut cases = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(named) = line.strip_prefix("@world ") {
            world = named.into();
        } else if !line.is_empty() && !line.starts_with('#') {
            cases.push(Case::read(&world, format!("{name}:{}", n + 1), line));
        }
    }
    cases
}

fn hex(value: &[u8]) -> String {
    value.iter().rev().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes it");
        text
    })
}

/// The items in which `new` differs from `old`.
pub fn items(old: &State, new: &State) -> String {
    let mut list = Vec::new();
    let (a, b) = (&old.image, &new.image);
    list.extend((0..16).filter(|n| a.gpr[*n] != b.gpr[*n]).map(|n| format!("{}={:x}", GPR[n], b.gpr[n])));
    let mut word = |name: &str, a: u64, b: u64| {
        if a != b {
            list.push(format!("{name}={b:x}"));
        }
    };
    word("flags", a.rflags, b.rflags);
    word("fcw", a.area.fcw.into(), b.area.fcw.into());
    word("fsw", a.area.fsw.into(), b.area.fsw.into());
    word("ftw", a.area.ftw.into(), b.area.ftw.into());
    word("mxcsr", a.area.mxcsr.into(), b.area.mxcsr.into());
    list.extend((0..8).filter(|n| a.area.st[*n] != b.area.st[*n]).map(|n| format!("st{n}={}", hex(&b.area.st[n][..10]))));
    for n in 0..16 {
        if a.area.ymm_high[n] != b.area.ymm_high[n] {
            list.push(format!("ymm{n}={}{}", hex(&b.area.ymm_high[n]), hex(&b.area.xmm[n])));
        } else if a.area.xmm[n] != b.area.xmm[n] {
            list.push(format!("xmm{n}={}", hex(&b.area.xmm[n])));
        }
    }
    let selectors = new.selectors.iter().filter(|(n, selector)| old.selectors.get(n).is_some_and(|other| other != *selector));
    list.extend(selectors.map(|(n, selector)| format!("{}={selector:x}", SEGMENTS[*n])));
    let mut run: Option<(u64, Vec<u8>)> = None;
    for (at, byte) in new.memory.iter().filter(|(at, byte)| old.memory.get(at).copied().unwrap_or(0) != **byte) {
        match &mut run {
            Some((start, bytes)) if *start + bytes.len() as u64 == *at => bytes.push(*byte),
            _ => list.extend(run.replace((*at, vec![*byte])).map(|(start, bytes)| memory_item(start, &bytes))),
        }
    }
    list.extend(run.map(|(start, bytes)| memory_item(start, &bytes)));
    if let Some(fault) = b.fault {
        let error = if fault.error != 0 { format!(":{:x}", fault.error) } else { String::new() };
        let address = if fault.vector == 14 { format!("@{:x}", fault.address) } else { String::new() };
        list.push(format!("fault={}{error}{address}", fault.vector));
    }
    list.join(" ")
}

fn memory_item(start: u64, bytes: &[u8]) -> String {
    let text = bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    format!("[{start:x}]={text}")
}
