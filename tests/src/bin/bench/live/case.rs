//! What is measured: three guests, and three ways to move them.

use std::time::Duration;

use ferry_tests::guest::{self, Order, Rate};

use crate::way::{Case, Way};

/// A guest on a link.
pub struct Guest {
    /// What is told of it.
    pub case: Case,
    /// The guest to be.
    pub guest: fn() -> guest::Guest,
    /// The link's rate where it is limited (`tc tbf`), Mbit/s.
    pub link_mbit: Option<u32>,
}

/// All guests, the quick one first.
pub const GUESTS: [Guest; 3] = [
    Guest {
        case: case("sparse-idle", 7, "4 GiB, about a tenth of it in use, idle"),
        guest: || load(4096, 140, 16, Rate(0)),
        link_mbit: None,
    },
    Guest {
        case: case(
            "half-steady",
            7,
            "1 GiB, half of it in use; 32 MiB/s written all over 128 MiB",
        ),
        guest: || load(1024, 320, 128, Rate::mib(32)),
        link_mbit: None,
    },
    Guest {
        case: case(
            "heavy-writer",
            2,
            "512 MiB; 96 MiB written over and over, faster than the 400 Mbit/s link",
        ),
        guest: || load(512, 64, 96, Rate::mib(150)),
        link_mbit: Some(400),
    },
];

const fn case(name: &'static str, turns: u32, what: &'static str) -> Case {
    Case {
        name,
        what,
        turns,
        limit: Duration::from_secs(120),
    }
}

fn load(memory: u64, filled: u64, set: u64, rate: Rate) -> guest::Guest {
    guest::Guest::linux("measured")
        .memory_mib(memory)
        .filled(filled)
        .working_set(set)
        .rate(rate)
        .order(Order::Random)
        .check(Rate(0))
}

/// A way to move a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// libvirt's own.
    Native,
    /// libvirt's own with `--parallel`: multifd, 2 channels.
    NativeParallel,
    /// virt-ferry, as installed: TLS 1.3, one stream.
    Ferry,
}

impl Route {
    /// All of them, the ones to compare with first.
    pub const ALL: [Route; 3] = [Route::Native, Route::NativeParallel, Route::Ferry];

    /// How it is told.
    pub const fn way(self) -> Way {
        let (key, name) = match self {
            Route::Native => ("native", "native"),
            Route::NativeParallel => ("native-parallel", "native --parallel"),
            Route::Ferry => ("ferry", "virt-ferry"),
        };
        Way { key, name }
    }

    /// What `virsh migrate --live` is told besides.
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Route::NativeParallel => &["--parallel"],
            Route::Native | Route::Ferry => &[],
        }
    }

    /// virt-ferry's configuration on both hosts. Without its engine, a host migrates libvirt's own way; `enabled = false`
    /// would also keep the next QEMU from virt-ferry's next turn.
    pub fn configuration(self) -> &'static str {
        match self {
            Route::Ferry => "",
            Route::Native | Route::NativeParallel => "engine = \"/nonexistent\"\n",
        }
    }
}
