//! A link of the lab made slow, so that a migration lasts long enough to be looked at or interfered with.

use anyhow::Result;

use crate::host::Host;
use crate::lab::Lab;

/// While it lives, what flows to one host passes at a set rate at most.
pub struct Slow<'a> {
    lab: &'a Lab,
    /// The switch's end of the host's link.
    device: &'a str,
}

impl<'a> Slow<'a> {
    /// Slows what flows to `host` down to `mbit` Mbit/s.
    ///
    /// # Errors
    /// What tc said.
    pub fn to(lab: &'a Lab, host: &'a Host, mbit: u32) -> Result<Self> {
        let slow = Slow {
            lab,
            device: host.name(),
        };
        slow.set(mbit)?;
        Ok(slow)
    }

    /// The same at another rate.
    ///
    /// # Errors
    /// What tc said.
    pub fn set(&self, mbit: u32) -> Result<()> {
        // The burst takes the largest segment a veth passes on in one piece, 64 KiB.
        let command = format!(
            "tc qdisc replace dev {} root tbf rate {mbit}mbit burst 256kb latency 50ms",
            self.device
        );
        self.lab.switch().run(&command.split(' ').collect::<Vec<_>>())?;
        Ok(())
    }
}

impl Drop for Slow<'_> {
    fn drop(&mut self) {
        let lifted = self
            .lab
            .switch()
            .run(&["tc", "qdisc", "del", "dev", self.device, "root"]);
        if let Err(error) = lifted {
            eprintln!("the link to {} stays slow: {error:#}", self.device);
        }
    }
}
