//! The ledger: what was compared, what was left out and why, which differences are explained.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::explained::REASONS;
use super::forms::Left;

/// Counts of one mnemonic.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Comparisons in code of 16, 32 and 64 bits.
    pub by_size: [u64; 3],
    pub faults: u64,
    /// Cases in which Unicorn says something else than engine and host.
    pub unicorn_differs: u64,
}

/// Counts of one family.
#[derive(Default)]
pub struct Family {
    pub forms: BTreeSet<usize>,
    pub compared: u64,
    pub faults: u64,
    /// Cases in which host and engine are the same and Unicorn was asked, by [`super::unicorn::Outcome`].
    pub unicorn: [u64; 3],
}

/// Counts of a run.
#[derive(Default)]
pub struct Ledger {
    pub families: BTreeMap<&'static str, Family>,
    pub instructions: BTreeMap<(&'static str, String), Counts>,
    /// Comparisons of the engine's tiers with each other.
    pub tiers: u64,
    pub explained: BTreeMap<&'static str, (u64, BTreeSet<String>)>,
    pub vectors: BTreeMap<u8, u64>,
    pub left: BTreeMap<Left, BTreeSet<String>>,
    pub unreached: BTreeSet<String>,
    pub unexplained: Vec<String>,
    pub unexplained_count: u64,
}

impl Ledger {
    pub fn compared(&self) -> u64 {
        self.families.values().map(|family| family.compared).sum()
    }

    pub fn merge(&mut self, other: Ledger) {
        for (name, family) in other.families {
            let mine = self.families.entry(name).or_default();
            mine.forms.extend(family.forms);
            mine.compared += family.compared;
            mine.faults += family.faults;
            mine.unicorn.iter_mut().zip(family.unicorn).for_each(|(mine, count)| *mine += count);
        }
        self.tiers += other.tiers;
        for (name, counts) in other.instructions {
            let mine = self.instructions.entry(name).or_default();
            mine.faults += counts.faults;
            mine.unicorn_differs += counts.unicorn_differs;
            mine.by_size.iter_mut().zip(counts.by_size).for_each(|(mine, count)| *mine += count);
        }
        for (name, (count, who)) in other.explained {
            let mine = self.explained.entry(name).or_default();
            mine.0 += count;
            mine.1.extend(who);
        }
        for (vector, count) in other.vectors {
            *self.vectors.entry(vector).or_default() += count;
        }
        for (reason, who) in other.left {
            self.left.entry(reason).or_default().extend(who);
        }
        self.unreached.extend(other.unreached);
        self.unexplained.extend(other.unexplained);
        self.unexplained_count += other.unexplained_count;
    }

    /// An oracle that contradicts engine and host more often than its own bugs do is not set up right.
    pub fn check_unicorn(&self) {
        for (name, family) in &self.families {
            let [agrees, differs, _] = family.unicorn;
            assert!(agrees >= differs, "{name}: Unicorn differs in {differs} cases and agrees in {agrees}");
        }
    }

    /// The ledger as lines `kind<TAB>name<TAB>numbers...`, for `docs/differential.md`.
    pub fn table(&self, part: &str, seed: u64, seconds: f64) -> String {
        let mut text = String::new();
        let mut line = |fields: &[String]| writeln!(text, "{}", fields.join("\t")).expect("a string takes it");
        line(&[
            "run".into(),
            self.compared().to_string(),
            seed.to_string(),
            format!("{seconds:.0}"),
            self.unexplained_count.to_string(),
            self.tiers.to_string(),
            part.to_owned(),
        ]);
        for (name, family) in &self.families {
            line(&[
                "family".into(),
                (*name).into(),
                family.forms.len().to_string(),
                family.compared.to_string(),
                family.faults.to_string(),
                family.unicorn.map(|count| count.to_string()).join("\t"),
            ]);
        }
        for ((family, name), counts) in &self.instructions {
            let [bits16, bits32, bits64] = counts.by_size.map(|count| count.to_string());
            line(&["instruction".into(), (*family).into(), name.clone(), bits64, bits32, bits16, counts.faults.to_string()]);
            if counts.unicorn_differs > 0 {
                line(&["unicorn".into(), (*family).into(), name.clone(), counts.unicorn_differs.to_string()]);
            }
        }
        for (vector, count) in &self.vectors {
            line(&["vector".into(), vector.to_string(), count.to_string()]);
        }
        for reason in REASONS {
            let Some((count, who)) = self.explained.get(reason.name) else { continue };
            let who: Vec<_> = who.iter().map(String::as_str).collect();
            line(&["explained".into(), reason.name.into(), count.to_string(), who.join(" "), reason.text.into()]);
        }
        for (reason, who) in &self.left {
            line(&["left".into(), format!("{reason:?}"), who.len().to_string()]);
        }
        text
    }
}
