//! libvirt's own certificates for migrations (`virsh migrate --tls`), found as libvirt finds them.
//!
//! As libvirt 11.3 does it (`qemu_conf.c`: `virQEMUDriverConfigLoadSpecificTLSEntry`, `…SetDefaults`): what qemu.conf
//! says for migrations, else the directory for migrations where there is one, else what it says for everything. libvirt
//! reads that file when its daemon starts; we read it for each migration.

use super::conf::Conf;
use ferry_contract::control::Certificates;
use std::path::Path;

/// The directory for migrations where qemu.conf names none.
const MIGRATE: &str = "/etc/pki/libvirt-migrate";
/// The directory for everything where qemu.conf names none.
const DEFAULT: &str = "/etc/pki/qemu";

/// The certificates of this host.
///
/// # Errors
/// Why only libvirt can use them.
pub fn certificates() -> Result<Certificates, String> {
    found(&Conf::of_qemu(), |directory| directory.exists())
}

/// Whether this host allows no migration without libvirt's certificates.
pub fn tls_is_forced() -> bool {
    is_forced(&Conf::of_qemu())
}

fn is_forced(conf: &Conf) -> bool {
    conf.flag("migrate_tls_force") == Some(true)
}

fn found(conf: &Conf, exists: impl Fn(&Path) -> bool) -> Result<Certificates, String> {
    let named = conf.string("migrate_tls_x509_cert_dir");
    let own_password = conf.string("migrate_tls_x509_secret_uuid");
    let any_password = conf.string("default_tls_x509_secret_uuid");
    if own_password.is_some() || named.is_none() && any_password.is_some() {
        return Err(
            "the key of its TLS certificate needs a password that only libvirt has (tls_x509_secret_uuid in \
                    qemu.conf); the engine takes keys without one"
                .into(),
        );
    }
    if is_forced(conf) {
        return Err("libvirt is to protect QEMU's own stream itself (migrate_tls_force in qemu.conf)".into());
    }
    let directory = match named {
        Some(directory) => directory,
        None if exists(Path::new(MIGRATE)) => MIGRATE,
        None => conf.string("default_tls_x509_cert_dir").unwrap_or(DEFAULT),
    };
    let verify = conf
        .flag("migrate_tls_x509_verify")
        .or_else(|| conf.flag("default_tls_x509_verify"));
    Ok(Certificates {
        directory: directory.into(),
        verify: verify.unwrap_or(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_conf(text: &str, there: &[&str]) -> Result<Certificates, String> {
        found(&Conf::new(text), |path| {
            there.iter().any(|there| path == Path::new(there))
        })
    }

    fn these(directory: &str, verify: bool) -> Result<Certificates, String> {
        Ok(Certificates {
            directory: directory.into(),
            verify,
        })
    }

    #[test]
    fn the_directory_is_libvirts_choice() {
        assert_eq!(in_conf("", &[]), these(DEFAULT, true));
        assert_eq!(in_conf("", &[MIGRATE]), these(MIGRATE, true));
        let default = "default_tls_x509_cert_dir = \"/d\"\n";
        assert_eq!(in_conf(default, &[]), these("/d", true));
        assert_eq!(in_conf(default, &[MIGRATE]), these(MIGRATE, true));
        let both = "default_tls_x509_cert_dir = \"/d\"\nmigrate_tls_x509_cert_dir = \"/m\"\n";
        assert_eq!(in_conf(both, &[MIGRATE]), these("/m", true));
    }

    #[test]
    fn the_more_special_word_on_verifying_counts() {
        let default = "default_tls_x509_verify = 0\n";
        assert_eq!(in_conf(default, &[]), these(DEFAULT, false));
        let both = "default_tls_x509_verify = 0\nmigrate_tls_x509_verify = 1\n";
        assert_eq!(in_conf(both, &[]), these(DEFAULT, true));
    }

    #[test]
    fn where_libvirt_insists_it_has_its_way() {
        assert!(in_conf("migrate_tls_force = 1\n", &[]).is_err());
        assert_eq!(in_conf("migrate_tls_force = 0\n", &[]), these(DEFAULT, true));
    }

    #[test]
    fn a_key_with_a_password_is_libvirts() {
        assert!(in_conf("migrate_tls_x509_secret_uuid = \"u\"", &[]).is_err());
        assert!(in_conf("default_tls_x509_secret_uuid = \"u\"", &[]).is_err());
        // The default's password is not that of a directory for migrations.
        let other = "default_tls_x509_secret_uuid = \"u\"\nmigrate_tls_x509_cert_dir = \"/m\"\n";
        assert_eq!(in_conf(other, &[]), these("/m", true));
    }
}
