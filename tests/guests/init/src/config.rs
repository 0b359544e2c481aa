//! The load a guest is started with, as `ferry.KEY=VALUE` words on its kernel command line.
//!
//! | word | meaning | unset |
//! |---|---|---|
//! | `ferry.set=MIB` | working set: memory the writer keeps changing | 16 |
//! | `ferry.ram=MIB` | memory filled once and only checked | 0 |
//! | `ferry.rate=N`, `NM`, `max` | pages a second, MiB a second, or as fast as it goes | 1000 |
//! | `ferry.order=cyclic`, `random` | the order in which pages are written | cyclic |
//! | `ferry.check=N`, `NM`, `max` | pace of the background check, 0: only on demand | 64M |
//! | `ferry.ip=A.B.C.D/LEN` | address of the first NIC | no network |
//! | `ferry.beat=IP:PORT` | where the heartbeat goes | the subnet's broadcast, port 7700 |
//! | `ferry.beat_us=N` | time between two heartbeats in µs, 0: none | 1000 |
//! | `ferry.disk=NAME:MIB:PER_SECOND` | O_DIRECT load on a virtio disk: blocks of 4 KiB written, and as many read | none |
//! | `ferry.files=NAME` | the ext4 on this disk is checked at the start, and a file added | none |
//! | `ferry.tpm=1` | says how often the TPM has been reset | 0 |

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;

use crate::page::PAGE_SIZE;

/// UDP port on which the guest takes commands.
pub const COMMAND_PORT: u16 = 7701;
/// UDP port to which the heartbeat goes if none is said.
pub const BEAT_PORT: u16 = 7700;

/// Pages in a MiB.
pub const PAGES_PER_MIB: u64 = (1 << 20) / PAGE_SIZE as u64;

/// Pages a second; [`Rate::MAX`] is as fast as it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

impl Rate {
    /// No limit.
    pub const MAX: Rate = Rate(u64::MAX);

    /// A rate in MiB a second.
    pub const fn mib(mib: u64) -> Self {
        Rate(mib.saturating_mul(PAGES_PER_MIB))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Rate::MAX => write!(f, "max"),
            Rate(pages) => write!(f, "{pages}"),
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |_| format!("rate '{text}': say pages a second (1000), MiB a second (8M) or max");
        match text.strip_suffix('M') {
            Some(mib) => mib.parse().map(Rate::mib).map_err(wrong),
            None if text == "max" => Ok(Rate::MAX),
            None => text.parse().map(Rate).map_err(wrong),
        }
    }
}

/// The order in which the writer goes through its working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One page after the other, again and again.
    Cyclic,
    /// Any page, by a pseudo-random sequence.
    Random,
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Order::Cyclic => "cyclic",
            Order::Random => "random",
        })
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cyclic" => Ok(Order::Cyclic),
            "random" => Ok(Order::Random),
            other => Err(format!("order '{other}': say cyclic or random")),
        }
    }
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The guest's own address.
    pub ip: Ipv4Addr,
    /// Bits of the network prefix, 0 to 32.
    pub prefix: u8,
}

impl Address {
    /// The network mask.
    pub fn mask(&self) -> Ipv4Addr {
        let host_bits = 32 - u32::from(self.prefix.min(32));
        Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0))
    }

    /// The address that reaches everyone on the network.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.ip) | !u32::from(self.mask()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("address '{text}': say one like 192.168.77.101/24");
        let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = Address {
            ip: ip.parse().map_err(|_| wrong())?,
            prefix: prefix.parse().map_err(|_| wrong())?,
        };
        if address.prefix > 32 {
            return Err(wrong());
        }
        Ok(address)
    }
}

/// Load on a virtio disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The device's name in /dev, such as vda.
    pub name: String,
    /// How much of it is used, from its start, in MiB.
    pub mib: u64,
    /// Blocks of 4 KiB written a second, and as many read.
    pub rate: Rate,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.name, self.mib, self.rate)
    }
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("disk '{text}': say NAME:MIB:PER_SECOND, such as vda:64:100");
        let mut parts = text.splitn(3, ':');
        let name = parts.next().ok_or_else(wrong)?;
        let mib = parts.next().and_then(|mib| mib.parse().ok()).ok_or_else(wrong)?;
        let rate = parts.next().ok_or_else(wrong)?.parse()?;
        if mib == 0 || name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(wrong());
        }
        Ok(Disk {
            name: name.to_owned(),
            mib,
            rate,
        })
    }
}

/// Everything a guest is told at its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Working set, MiB.
    pub set: u64,
    /// Memory filled once, MiB.
    pub ram: u64,
    /// Pace of the writer.
    pub rate: Rate,
    /// Order of the writer.
    pub order: Order,
    /// Pace of the background checker; 0: checks on demand only.
    pub check: Rate,
    /// Address of the first NIC; without one there is no network.
    pub ip: Option<Address>,
    /// Where the heartbeat goes; the subnet's broadcast if unset.
    pub beat: Option<SocketAddrV4>,
    /// Microseconds between two heartbeats; 0: none.
    pub beat_us: u64,
    /// Load on a disk.
    pub disk: Option<Disk>,
    /// The disk whose file system is checked.
    pub files: Option<String>,
    /// There is a TPM to be asked.
    pub tpm: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            set: 16,
            ram: 0,
            rate: Rate(1000),
            order: Order::Cyclic,
            check: Rate::mib(64),
            ip: None,
            beat: None,
            beat_us: 1000,
            disk: None,
            files: None,
            tpm: false,
        }
    }
}

impl Config {
    /// Reads the `ferry.` words of a kernel command line; other words are the kernel's.
    ///
    /// # Errors
    /// A word that is unknown or has an unusable value: a misspelt load must not pass for a tested one.
    pub fn parse(cmdline: &str) -> Result<Self, String> {
        let mut config = Config::default();
        for word in cmdline.split_whitespace() {
            let Some((key, value)) = word.strip_prefix("ferry.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            let number = || {
                value
                    .parse::<u64>()
                    .map_err(|_| format!("ferry.{key}: '{value}' is no number"))
            };
            match key {
                "set" => config.set = number()?,
                "ram" => config.ram = number()?,
                "rate" => config.rate = value.parse()?,
                "order" => config.order = value.parse()?,
                "check" => config.check = value.parse()?,
                "ip" => config.ip = Some(value.parse()?),
                "beat" => {
                    let wrong = |_| format!("ferry.beat: '{value}' is no IP:PORT");
                    config.beat = Some(value.parse().map_err(wrong)?);
                }
                "beat_us" => config.beat_us = number()?,
                "disk" => config.disk = Some(value.parse()?),
                "files" => config.files = Some(value.to_owned()),
                "tpm" => config.tpm = number()? != 0,
                other => return Err(format!("ferry.{other}: unknown")),
            }
        }
        Ok(config)
    }

    /// Where the heartbeat goes, if there is one.
    pub fn beat_target(&self) -> Option<SocketAddrV4> {
        let address = self.ip.filter(|_| self.beat_us > 0)?;
        Some(
            self.beat
                .unwrap_or(SocketAddrV4::new(address.broadcast(), BEAT_PORT)),
        )
    }
}

impl fmt::Display for Config {
    /// The words for the kernel command line; [`Config::parse`] reads them back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ferry.set={} ferry.ram={} ferry.rate={} ferry.order={} ferry.check={} ferry.beat_us={}",
            self.set, self.ram, self.rate, self.order, self.check, self.beat_us
        )?;
        if let Some(ip) = self.ip {
            write!(f, " ferry.ip={ip}")?;
        }
        if let Some(beat) = self.beat {
            write!(f, " ferry.beat={beat}")?;
        }
        if let Some(disk) = &self.disk {
            write!(f, " ferry.disk={disk}")?;
        }
        if let Some(files) = &self.files {
            write!(f, " ferry.files={files}")?;
        }
        if self.tpm {
            write!(f, " ferry.tpm=1")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let config = Config {
            set: 128,
            ram: 256,
            rate: Rate::mib(8),
            order: Order::Random,
            check: Rate(0),
            ip: Some("192.168.77.101/24".parse().expect("address")),
            beat: Some("192.168.77.1:9000".parse().expect("address and port")),
            beat_us: 500,
            disk: Some(Disk {
                name: "vda".to_owned(),
                mib: 64,
                rate: Rate::MAX,
            }),
            files: Some("vdb".to_owned()),
            tpm: true,
        };
        assert_eq!(
            Config::parse(&format!("console=ttyS0 {config} quiet")),
            Ok(config)
        );
        assert_eq!(
            Config::parse(&Config::default().to_string()),
            Ok(Config::default())
        );
    }

    #[test]
    fn a_misspelt_word_is_an_error() {
        for cmdline in [
            "ferry.rat=5",
            "ferry.rate=5K",
            "ferry.set=x",
            "ferry.ip=1.2.3.4",
            "ferry.disk=../x:1:1",
        ] {
            assert!(Config::parse(cmdline).is_err(), "{cmdline}");
        }
    }

    #[test]
    fn the_beat_goes_to_the_subnet() {
        let config = Config::parse("ferry.ip=192.168.77.101/24").expect("good words");
        assert_eq!(
            config.beat_target(),
            Some("192.168.77.255:7700".parse().expect("address and port"))
        );
        assert_eq!(Config::default().beat_target(), None);
        assert_eq!(
            Address {
                ip: Ipv4Addr::LOCALHOST,
                prefix: 0
            }
            .mask(),
            Ipv4Addr::UNSPECIFIED
        );
    }
}
