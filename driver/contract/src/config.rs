//! `/etc/virt-ferry/virt-ferry.toml`: all optional, unknown keys refused with their line.

use crate::control::Settings;
use crate::session::Encryption;
use serde::{Deserialize, Deserializer};
use std::path::PathBuf;

/// Where the plug-in looks for its configuration; it need not exist.
pub const PATH: &str = "/etc/virt-ferry/virt-ferry.toml";

/// The key of [`Config::state_directory`].
const STATE_DIRECTORY: &str = "state_directory";

/// The configuration of one host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `false`: every migration is libvirt's own, and no QEMU gets a private monitor.
    pub enabled: bool,
    /// Whether the engines encrypt; the stricter of the two hosts decides.
    #[serde(deserialize_with = "encryption")]
    pub encryption: Encryption,
    /// Parallel streams for the memory, 1 to 16.
    pub streams: u16,
    /// First and last TCP port to listen on for incoming guests: libvirt's own range, which firewalls know.
    pub ports: [u16; 2],
    /// What becomes of guests that do not choose their memory.
    pub guest_memory: GuestMemory,
    /// Slow down guests that write faster than their link, also where nobody asked (`virsh migrate --auto-converge`):
    /// after 30 rounds that did not get anywhere.
    pub auto_converge: bool,
    /// Compare all of the guest's memory on both hosts, byte for byte, before each commitment. A test mode: it
    /// lengthens the pause by reading all of the memory on both hosts.
    pub verify_memory: bool,
    /// The engine's program.
    pub engine: PathBuf,
    /// Where the engine of a leaving guest makes the socket for libvirt.
    pub runtime_directory: PathBuf,
    /// Where timelines go.
    pub log_directory: PathBuf,
    /// Where the journals of cold migrations are kept, which must survive a crash.
    pub state_directory: PathBuf,
    /// Guests that move while they are shut off.
    pub cold: Cold,
}

/// `[cold]`: guests that move while they are shut off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cold {
    /// What becomes of the source's files once the guest belongs to the destination.
    pub source_storage: SourceStorage,
}

/// What becomes of files that have moved, where the source's definition is removed too (`--undefinesource`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceStorage {
    /// They are deleted.
    #[default]
    Delete,
    /// They stay.
    Keep,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: true,
            encryption: Encryption::Always,
            streams: 1,
            ports: [49152, 49215],
            guest_memory: GuestMemory::Shared,
            auto_converge: true,
            verify_memory: false,
            engine: "/usr/lib/virt-ferry/virt-ferry-engine".into(),
            runtime_directory: "/run/libvirt/virt-ferry".into(),
            log_directory: "/var/log/virt-ferry".into(),
            state_directory: "/var/lib/virt-ferry".into(),
            cold: Cold::default(),
        }
    }
}

/// The memory of guests whose definition does not choose one (`<memoryBacking>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestMemory {
    /// A shared file, where the host's directory for such files is on a tmpfs: the engine can move it.
    Shared,
    /// libvirt's choice: anonymous memory, which only libvirt's own migration moves.
    AsDefined,
}

/// What a host may choose; certificates are asked for by a migration.
fn encryption<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Encryption, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Choice {
        Always,
        Never,
    }
    Ok(match Choice::deserialize(deserializer)? {
        Choice::Always => Encryption::Always,
        Choice::Never => Encryption::Never,
    })
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// TOML, or a key or value that is not ours.
    #[error("{0}")]
    Syntax(String),
    /// A value outside its range.
    #[error("{key} = {value} is outside {range}")]
    Range {
        /// The key.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        range: &'static str,
    },
}

impl Config {
    /// Reads a configuration's text; an empty text is the default configuration.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|error| Error::Syntax(error.to_string()))?;
        if !(1..=16).contains(&config.streams) {
            let value = config.streams.to_string();
            return Err(Error::Range {
                key: "streams",
                value,
                range: "1 to 16",
            });
        }
        let [first, last] = config.ports;
        if first == 0 || first > last {
            let value = format!("[{first}, {last}]");
            return Err(Error::Range {
                key: "ports",
                value,
                range: "[first, last], first at most last",
            });
        }
        Ok(config)
    }

    /// Where the journals are, also in a text that [`parse`](Self::parse) refuses: a mistake elsewhere must not let a guest
    /// start that is between two hosts. `None` where the text does not let that be known.
    pub fn state_directory_in(text: &str) -> Option<PathBuf> {
        let of = |text: &str| match toml::from_str::<toml::Table>(text).ok()?.remove(STATE_DIRECTORY) {
            None => Some(Self::default().state_directory),
            Some(toml::Value::String(directory)) => Some(directory.into()),
            Some(_) => None,
        };
        of(text).or_else(|| {
            // No TOML as a whole; that key's line may be, or there may be none.
            let named = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
            let named: Vec<_> = named.filter(|line| line.contains(STATE_DIRECTORY)).collect();
            of(&named.join("\n"))
        })
    }

    /// What the engine needs of it.
    pub fn settings(&self) -> Settings {
        Settings {
            encryption: self.encryption,
            certificates: None,
            streams: self.streams,
            ports: (self.ports[0], self.ports[1]),
            auto_converge: self.auto_converge,
            verify_memory: self.verify_memory,
            runtime_directory: self.runtime_directory.clone(),
            log_directory: self.log_directory.clone(),
            state_directory: self.state_directory.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_means_default() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
    }

    #[test]
    fn each_key_is_heard() {
        let text = "enabled = false\nencryption = \"never\"\nstreams = 4\nports = [50000, 50010]\nguest_memory = \"as-defined\"\nauto_converge = false\n\
                    verify_memory = true\nengine = \"/e\"\nruntime_directory = \"/r\"\nlog_directory = \"/l\"\nstate_directory = \"/s\"\n\
                    [cold]\nsource_storage = \"keep\"\n";
        let config = Config::parse(text).unwrap();
        assert!(!config.enabled && !config.auto_converge && config.verify_memory);
        assert_eq!(
            (config.encryption, config.streams, config.ports),
            (Encryption::Never, 4, [50000, 50010])
        );
        assert_eq!(config.guest_memory, GuestMemory::AsDefined);
        assert_eq!(config.engine, PathBuf::from("/e"));
        let settings = config.settings();
        assert_eq!(
            (settings.runtime_directory, settings.log_directory),
            (PathBuf::from("/r"), PathBuf::from("/l"))
        );
        assert_eq!(
            (settings.state_directory, config.cold.source_storage),
            (PathBuf::from("/s"), SourceStorage::Keep)
        );
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let Err(Error::Syntax(text)) = Config::parse("enabled = true\nencrypt = \"never\"\n") else {
            panic!("accepted")
        };
        assert!(text.contains("line 2") && text.contains("encrypt"), "{text}");
    }

    #[test]
    fn certificates_are_no_hosts_choice() {
        let Err(Error::Syntax(text)) = Config::parse("encryption = \"certificates\"\n") else {
            panic!("accepted")
        };
        assert!(text.contains("`always` or `never`"), "{text}");
    }

    #[test]
    fn ranges_are_kept() {
        for text in ["streams = 0", "streams = 17", "ports = [0, 1]", "ports = [5, 4]"] {
            assert!(matches!(Config::parse(text), Err(Error::Range { .. })), "{text}");
        }
    }

    #[test]
    fn journals_are_found_whatever_else_is_wrong() {
        let default = Some(Config::default().state_directory);
        for (text, directory) in [
            ("", default.clone()),
            ("encrypt = 1\n", default.clone()),
            ("streams = \n", default.clone()),
            ("streams = \n# state_directory = \"/s\"\n", default),
            ("encrypt = 1\nstate_directory = \"/s\"\n", Some("/s".into())),
            (
                "streams = \nstate_directory = \"/s\" # there\n",
                Some("/s".into()),
            ),
            ("state_directory = /s\n", None),
            ("state_directory = 7\n", None),
        ] {
            assert!(Config::parse(text).is_err() || text.is_empty(), "{text}");
            assert_eq!(Config::state_directory_in(text), directory, "{text}");
        }
    }
}
