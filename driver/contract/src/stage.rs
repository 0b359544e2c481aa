//! The stages of one live migration, by the literature's names.
//!
//! Clark et al., "Live Migration of Virtual Machines" (NSDI 2005), drew them for Xen ("Design Overview"). libvirt's five
//! phases are coarser and are named differently on purpose:
//!
//! ```text
//!  stage            libvirt phase   who answers for the guest
//!  pre-migration    Begin           source
//!  reservation      Begin, Prepare  source
//!  pre-copy         Perform         source   (the guest runs)
//!  stop-and-copy    Perform         source   (the guest stands still)
//!  commitment       Perform         source until the destination's acknowledgement
//!  activation       Finish, Confirm destination
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// One stage of a live migration. Stages compare in the order in which they happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Is the guest eligible, and is the peer? Nothing is touched yet.
    PreMigration,
    /// The destination reserves memory and starts an empty QEMU.
    Reservation,
    /// Memory moves in rounds while the guest runs.
    PreCopy,
    /// The guest stands still: the last pages and the device state move.
    StopAndCopy,
    /// The destination acknowledges that everything has arrived.
    Commitment,
    /// The guest runs at the destination, the source lets go.
    Activation,
}

impl Stage {
    /// All stages, in order.
    pub const ALL: [Stage; 6] = [
        Stage::PreMigration,
        Stage::Reservation,
        Stage::PreCopy,
        Stage::StopAndCopy,
        Stage::Commitment,
        Stage::Activation,
    ];

    /// The stage's name as it stands in logs, files and messages (`pre-copy`).
    pub const fn name(self) -> &'static str {
        match self {
            Stage::PreMigration => "pre-migration",
            Stage::Reservation => "reservation",
            Stage::PreCopy => "pre-copy",
            Stage::StopAndCopy => "stop-and-copy",
            Stage::Commitment => "commitment",
            Stage::Activation => "activation",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_the_order_of_the_migration() {
        assert!(Stage::ALL.is_sorted());
        assert!(Stage::PreCopy < Stage::StopAndCopy && Stage::StopAndCopy < Stage::Commitment);
    }

    #[test]
    fn serde_and_display_agree() {
        for stage in Stage::ALL {
            let json = serde_json::to_string(&stage).unwrap();
            assert_eq!(json, format!("\"{stage}\""));
            assert_eq!(serde_json::from_str::<Stage>(&json).unwrap(), stage);
        }
        assert!(serde_json::from_str::<Stage>("\"precopy\"").is_err());
    }
}
