//! What is compared: ways to move a guest, the figures of each, and what was seen of one move.

use std::time::Duration;

/// A way to move a guest.
pub struct Way {
    /// As it is known in the JSON.
    pub key: &'static str,
    /// As a person reads it.
    pub name: &'static str,
}

/// A figure of a way, and how to show it.
pub struct Figure {
    /// As it is known in the JSON.
    pub key: &'static str,
    /// As a person reads it.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// What to divide the JSON's value by for that unit.
    pub scale: f64,
}

/// A [`Figure`].
pub const fn figure(key: &'static str, name: &'static str, unit: &'static str, scale: f64) -> Figure {
    Figure {
        key,
        name,
        unit,
        scale,
    }
}

/// What is compared with what.
pub struct Comparison {
    /// All ways, the ones to compare with first and ours last.
    pub ways: &'static [Way],
    /// The figures that are shown, in order of what matters to the guest's owner.
    pub figures: &'static [Figure],
}

/// A guest that is moved in all ways.
#[derive(Clone, Copy)]
pub struct Case {
    /// As it is known in the JSON.
    pub name: &'static str,
    /// What the guest is and does.
    pub what: &'static str,
    /// Turns unless told otherwise.
    pub turns: u32,
    /// A move that takes longer is called off.
    pub limit: Duration,
}

/// What was seen of one move.
pub struct Leg {
    /// False where it was called off at the limit; the figures are those up to then.
    pub finished: bool,
    /// By their keys: those of the [`Comparison`], and some more for the JSON.
    pub figures: Vec<(&'static str, f64)>,
}
