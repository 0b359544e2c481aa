//! The schemas of what our cookie's elements say, and what the code writes and reads of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::{self, Directory, Inventory, Kind, Medium, Metadata, MetadataKind, Part};
use ferry_contract::cookie::{self, Answer, ColdAnswer, ColdOffer, Offer};
use ferry_contract::session::{Block, Encryption, Guest, Token, PAGE};
use ferry_tests::checkout::{checkout, there_is};
use uuid::Uuid;

/// What libvirt makes of a guest's name and UUID; our element becomes its last child.
const COOKIE: &str = "<qemu-migration>\n  <name>g</name>\n  <hostname>h</hostname>\n</qemu-migration>\n\0";

/// The examples of a kind, by name.
fn examples(kind: &str) -> Result<Vec<PathBuf>> {
    let directory = checkout().join("xml-schemas/examples").join(kind);
    let mut paths = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths)
}

/// What xmllint says of an XML file by our schema.
fn validate(file: &Path) -> Result<Output> {
    Command::new("xmllint")
        .args(["--noout", "--nonet", "--relaxng"])
        .arg(checkout().join("xml-schemas/migration-cookie.rng"))
        .arg(file)
        .output()
        .context("xmllint")
}

/// What our parser makes of an element: read (true) or refused.
fn is_read(element: &str) -> bool {
    let inside = format!("{element}</qemu-migration>");
    let cookie = COOKIE.replace("</qemu-migration>", &inside);
    let cookie = cookie.as_bytes();
    match element {
        _ if element.contains("<ferry:offer") => matches!(cookie::offer(cookie), Ok(Some(_))),
        _ if element.contains("<ferry:answer") => matches!(cookie::answer(cookie), Ok(Some(_))),
        _ if element.contains("<ferry:cold-offer") => matches!(cookie::cold_offer(cookie), Ok(Some(_))),
        _ if element.contains("<ferry:cold-answer") => matches!(cookie::cold_answer(cookie), Ok(Some(_))),
        _ => cookie::is_probe(cookie),
    }
}

/// Our element out of a cookie.
fn element(cookie: &[u8]) -> Result<String> {
    let cookie = std::str::from_utf8(cookie)?;
    let begin = cookie.find("<ferry:").context("no element of ours")?;
    let end = cookie.rfind("</qemu-migration>").context("no cookie")?;
    Ok(cookie[begin..end].to_owned())
}

fn offer(encryption: Encryption, certificate: Vec<u8>, blocks: Vec<Block>) -> Offer {
    Offer {
        session: Uuid::new_v4(),
        token: Token::new([0xa5; Token::LENGTH]),
        encryption,
        certificate,
        blocks,
    }
}

fn block(name: &str, size: u64, resident: u64) -> Block {
    Block {
        name: name.into(),
        size,
        resident,
        page: PAGE,
    }
}

/// All that the code can write at its limits, and in between.
fn written() -> Result<Vec<String>> {
    let mut cookies = vec![cookie::probe()];
    let many = (0..cookie::MAX_BLOCKS).map(|n| block(&format!("dimm{n}"), PAGE, 0));
    for (encryption, certificate, blocks) in [
        (
            Encryption::Always,
            vec![0x30; 400],
            vec![block("pc.ram", 1 << 30, 1 << 20)],
        ),
        (Encryption::Never, Vec::new(), vec![block("pc.ram", PAGE, 0)]),
        (
            Encryption::Certificates,
            Vec::new(),
            vec![block("pc.ram", PAGE, 0)],
        ),
        (
            Encryption::Always,
            vec![0x30; 400],
            vec![Block {
                page: 2 << 20,
                ..block("ram-node0", 1 << 30, 1 << 30)
            }],
        ),
        (Encryption::Always, vec![0xff; 8190], many.collect()),
        (
            Encryption::Always,
            vec![0; 1],
            vec![block("<\"odd'> & é", 1 << 52, 1 << 52)],
        ),
    ] {
        let offer = offer(encryption, certificate, blocks);
        cookies.push(cookie::with_offer(COOKIE.as_bytes(), &offer)?);
    }
    for (encryption, host, port) in [
        (Encryption::Always, "host2.example.org", 49152),
        (Encryption::Never, "fe80::1%eth0", 1),
        (Encryption::Certificates, "192.0.2.1", 49152),
        (Encryption::Always, "192.0.2.1", 65535),
    ] {
        let answer = Answer {
            session: Uuid::new_v4(),
            encryption,
            certificate: vec![1, 2, 3],
            host: host.into(),
            port,
        };
        cookies.push(cookie::with_answer(COOKIE.as_bytes(), &answer)?);
    }
    for inventory in inventories() {
        let offer = ColdOffer {
            session: Uuid::new_v4(),
            token: Token::new([0x5a; Token::LENGTH]),
            encryption: Encryption::Always,
            certificate: vec![0x30; 400],
            host: "host1.example.org".into(),
            port: 49215,
            inventory,
        };
        cookies.push(cookie::with_cold_offer(COOKIE.as_bytes(), &offer)?);
    }
    let session = Uuid::new_v4();
    cookies.push(cookie::with_cold_answer(
        COOKIE.as_bytes(),
        ColdAnswer { session },
    )?);
    cookies.iter().map(|cookie| element(cookie)).collect()
}

/// A plain guest, and one with all there can be.
fn inventories() -> Vec<Inventory> {
    let file = |path: &str, part, kind, size| cold::File {
        path: path.into(),
        part,
        kind,
        size,
        allocated: size,
    };
    let disk = |target: &str, layer| Part::Disk {
        target: target.into(),
        layer,
        format: "qcow2".into(),
        relative: layer > 0,
    };
    let data = Part::Data {
        target: "vda".into(),
        layer: 255,
        relative: true,
    };
    let plain = Inventory {
        guest: Guest {
            name: "g".into(),
            uuid: Uuid::new_v4(),
        },
        autostart: false,
        files: vec![file("/images/g.qcow2", disk("vda", 0), Kind::File, 0)],
        directories: Vec::new(),
        media: Vec::new(),
        metadata: Vec::new(),
    };
    let metadata = |kind, name: &str| Metadata {
        kind,
        name: name.into(),
        current: true,
        xml: "<domain attribute='&amp;'>\n\t]]>é</domain>\n".into(),
    };
    let full = Inventory {
        autostart: true,
        files: vec![
            file(
                "/images/<odd> & 'é'.qcow2",
                disk("vda", 255),
                Kind::File,
                cold::MAX_SIZE,
            ),
            file("/dev/vg/lv", disk("vdb", 0), Kind::Block, 1),
            file("/d", data, Kind::File, 1),
            file("/n", Part::Nvram, Kind::File, 1),
            file("/t", Part::Tpm, Kind::File, 1),
            file("/l", Part::Log, Kind::File, 1),
            file("/o", Part::Other, Kind::File, 1),
        ],
        directories: vec![Directory {
            path: "/swtpm".into(),
            mode: 0o7777,
            owner: "tss".into(),
            group: "1000".into(),
        }],
        media: vec![Medium {
            target: "sda".into(),
            path: "/iso/install.iso".into(),
        }],
        metadata: vec![
            metadata(MetadataKind::Snapshot, "before & after"),
            metadata(MetadataKind::Checkpoint, "c"),
        ],
        ..plain.clone()
    };
    vec![plain, full]
}

#[test]
fn the_code_writes_what_the_schema_describes() -> Result<()> {
    if !there_is("xmllint", "libxml2-utils") {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    for (number, element) in written()?.iter().enumerate() {
        let file = directory.path().join(format!("{number}.xml"));
        fs::write(&file, element)?;
        let output = validate(&file)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{element}\n{said}");
        ensure!(
            is_read(element),
            "the code does not read what it wrote: {element}"
        );
    }
    Ok(())
}

#[test]
fn valid_examples_are_read_and_validate() -> Result<()> {
    let examples = examples("valid")?;
    ensure!(examples.len() >= 3, "{examples:?}");
    for path in &examples {
        ensure!(
            is_read(&fs::read_to_string(path)?),
            "{} is refused",
            path.display()
        );
    }
    if !there_is("xmllint", "libxml2-utils") {
        return Ok(());
    }
    for path in &examples {
        let output = validate(path)?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

#[test]
fn invalid_examples_are_refused_by_code_and_schema() -> Result<()> {
    let examples = examples("invalid")?;
    ensure!(examples.len() >= 10, "{examples:?}");
    for path in &examples {
        ensure!(!is_read(&fs::read_to_string(path)?), "{} is read", path.display());
    }
    if !there_is("xmllint", "libxml2-utils") {
        return Ok(());
    }
    for path in &examples {
        let output = validate(path)?;
        let said = String::from_utf8_lossy(&output.stderr);
        // Refused by the schema, and not because it is no XML or the schema no schema.
        ensure!(
            output.status.code() == Some(3),
            "{}: {} {said}",
            path.display(),
            output.status
        );
    }
    Ok(())
}
