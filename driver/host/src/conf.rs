//! Settings in libvirt's configuration files, as far as we need them.

const QEMU_CONF: &str = "/etc/libvirt/qemu.conf";

/// The text of such a file.
pub(super) struct Conf(String);

impl Conf {
    /// The QEMU driver's; none is an empty one.
    pub(super) fn of_qemu() -> Self {
        Self(super::read(QEMU_CONF.as_ref()).unwrap_or_default())
    }

    #[cfg(test)]
    pub(super) fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// `key = "value"`; an empty value is none.
    pub(super) fn string(&self, key: &str) -> Option<&str> {
        let value = self.value(key)?;
        let quote = value.chars().next().filter(|quote| ['"', '\''].contains(quote))?;
        value[1..].split(quote).next().filter(|value| !value.is_empty())
    }

    /// `key = 0` or `key = 1`.
    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.value(key)?.split([' ', '\t', '#']).next() {
            Some("0") => Some(false),
            Some("1") => Some(true),
            _ => None,
        }
    }

    /// What follows a key's first `=`: of several lines libvirt takes the first (libvirt 11.3, `virConfGetValue`).
    fn value(&self, key: &str) -> Option<&str> {
        self.0.lines().find_map(|line| {
            let value = line.trim().strip_prefix(key)?.trim_start();
            Some(value.strip_prefix('=')?.trim_start())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_as_libvirt_finds_them() {
        let conf = Conf::new(
            "# migration_host = \"no\"\n  migration_host = \"host.example\" # why\nmigration_host=\"later\"\n\
             migration_hosts = \"x\"\nempty = \"\"\nsingle = 'a \"b\"'\n",
        );
        assert_eq!(conf.string("migration_host"), Some("host.example"));
        assert_eq!(conf.string("single"), Some("a \"b\""));
        assert_eq!(conf.string("empty"), None);
        assert_eq!(conf.string("absent"), None);
    }

    #[test]
    fn flags_are_numbers() {
        let conf = Conf::new("yes = 1\nno=0 # off\nodd = \"1\"\n");
        assert_eq!(conf.flag("yes"), Some(true));
        assert_eq!(conf.flag("no"), Some(false));
        assert_eq!(conf.flag("odd"), None);
        assert_eq!(conf.flag("absent"), None);
    }
}
