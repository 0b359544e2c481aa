//! What is written is read, and nothing else.

use super::*;
use crate::cookie::NAMESPACE;
use uuid::Uuid;

fn an_inventory() -> Inventory {
    let file = |path: &str, part| File {
        path: path.into(),
        part,
        kind: Kind::File,
        size: 10 << 30,
        allocated: 1 << 20,
    };
    let disk = |target: &str, layer| Part::Disk {
        target: target.into(),
        layer,
        format: "qcow2".into(),
        relative: layer > 0,
    };
    Inventory {
        guest: Guest {
            name: "odd<>&'\" name".into(),
            uuid: Uuid::from_u128(7),
        },
        autostart: true,
        files: vec![
            file("/images/top & 'more'.qcow2", disk("vda", 0)),
            file("/images/base.qcow2", disk("vda", 1)),
            file(
                "/images/ä.raw",
                Part::Data {
                    target: "vda".into(),
                    layer: 0,
                    relative: false,
                },
            ),
            File {
                kind: Kind::Block,
                ..file("/dev/vg/lv", disk("vdb", 0))
            },
            file("/nvram/g_VARS.fd", Part::Nvram),
            file("/swtpm/u/tpm2/tpm2-00.permall", Part::Tpm),
            file("/log/g.log", Part::Log),
            file("/images/memory.1", Part::Other),
        ],
        directories: vec![Directory {
            path: "/swtpm/u".into(),
            mode: 0o711,
            owner: "tss".into(),
            group: "tss".into(),
        }],
        media: vec![Medium {
            target: "sda".into(),
            path: "/iso/install.iso".into(),
        }],
        metadata: vec![
            Metadata {
                kind: MetadataKind::Snapshot,
                name: "s1".into(),
                current: true,
                xml: "<domainsnapshot>\n\t<name>s1</name>\n  <a b='&amp;'/></domainsnapshot>\n".into(),
            },
            Metadata {
                kind: MetadataKind::Checkpoint,
                name: "c1".into(),
                current: false,
                xml: "<domaincheckpoint/>".into(),
            },
        ],
    }
}

#[test]
fn what_is_written_is_read() {
    let inventory = an_inventory();
    let xml = inventory.to_xml().unwrap();
    assert_eq!(Inventory::from_xml(&xml), Ok(inventory));
}

#[test]
fn malformed_inventories_are_refused() {
    let good = an_inventory().to_xml().unwrap();
    for (from, to) in [
        ("path='/images/base.qcow2'", "path='images/base.qcow2'"),
        ("path='/images/base.qcow2'", "path='/images/../base.qcow2'"),
        ("path='/images/base.qcow2'", "path='/images//base.qcow2'"),
        ("path='/images/base.qcow2'", "path='/images/base.qcow2/'"),
        ("path='/images/base.qcow2'", "path='/images/&#10;.qcow2'"),
        ("path='/images/base.qcow2'", ""),
        ("layer='1'", "layer='256'"),
        ("layer='1'", ""),
        ("part='nvram'", "part='firmware'"),
        ("relative='yes'", "relative='perhaps'"),
        ("kind='block'", "kind='char'"),
        ("size='10737418240'", "size='-1'"),
        ("size='10737418240'", "size='1125899906842625'"),
        ("allocated='1048576'", "allocated='99999999999999999999'"),
        ("mode='711'", "mode='18'"),
        ("mode='711'", "mode='10000'"),
        ("autostart='yes'", "autostart='true'"),
        ("current='no'", ""),
        ("name='s1'", "name=''"),
        ("uuid='0", "uuid='x"),
        ("&lt;domaincheckpoint/&gt;", " "),
        ("</ferry:inventory>", ""),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good, "{from}");
        assert!(Inventory::from_xml(&bad).is_err(), "{from} -> {to}");
    }
    assert!(Inventory::from_xml(&good.replace(NAMESPACE, "https://example.org/")).is_err());
}

#[test]
fn names_that_xml_cannot_carry_are_refused_by_the_writer() {
    use std::os::unix::ffi::OsStringExt;
    for path in [
        PathBuf::from(std::ffi::OsString::from_vec(b"/images/\xff".to_vec())),
        "/images/a\tb".into(),
        "relative".into(),
    ] {
        let mut inventory = an_inventory();
        inventory.files[0].path = path;
        assert!(inventory.to_xml().is_err());
    }
}

#[test]
fn every_cut_and_every_flip_is_survived() {
    let good = an_inventory().to_xml().unwrap();
    for index in 0..good.len() {
        if let Some(cut) = good.get(..index) {
            assert!(Inventory::from_xml(cut).is_err());
        }
        let mut bad = good.clone().into_bytes();
        bad[index] ^= 0x15;
        if let Ok(bad) = String::from_utf8(bad) {
            let _ = Inventory::from_xml(&bad);
        }
    }
}

#[test]
fn bounds_hold() {
    let mut inventory = an_inventory();
    let medium = inventory.media[0].clone();
    inventory.media = vec![medium; MAX_MEDIA];
    assert!(inventory.to_xml().is_ok());
    inventory.media.push(inventory.media[0].clone());
    assert!(inventory.to_xml().is_err());
    inventory.media.clear();
    inventory.files.clear();
    assert!(inventory.to_xml().is_err());
}
