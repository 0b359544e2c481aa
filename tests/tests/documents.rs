//! What we hand out besides programs says what the programs do: schemas, example configuration, manual pages,
//! README, installer.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::{self, Directory, Inventory, Kind, Medium, Metadata, MetadataKind, Part};
use ferry_contract::config::Config;
use ferry_contract::cookie::{self, Answer, ColdAnswer, ColdOffer, Offer};
use ferry_contract::session::{Block, Encryption, Guest, Token, PAGE};
use ferry_tests::skipped;
use uuid::Uuid;

/// What libvirt makes of a guest's name and UUID; our element becomes its last child.
const COOKIE: &str = "<qemu-migration>\n  <name>g</name>\n  <hostname>h</hostname>\n</qemu-migration>\n\0";

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> Result<String> {
    fs::read_to_string(checkout().join(path)).with_context(|| path.to_owned())
}

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

/// Whether a program is there; if not, the test that needs it is skipped.
fn there_is(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        skipped(&format!("{program} is not installed (Debian: {package})"));
    }
    found
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

/// The lines `key = value` of the example configuration.
fn defaults() -> Result<Vec<(String, String)>> {
    let example = text("packaging/virt-ferry.toml")?;
    let lines = example.lines().filter_map(|line| line.strip_prefix('#'));
    let keys = lines.filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()));
    keys.map(|line| {
        let (key, value) = line.split_once(" = ").with_context(|| line.to_owned())?;
        Ok((key.to_owned(), value.to_owned()))
    })
    .collect()
}

#[test]
fn the_example_configuration_has_every_key_and_its_default() -> Result<()> {
    let example = text("packaging/virt-ferry.toml")?;
    ensure!(
        Config::parse(&example)? == Config::default(),
        "it is not all commented out"
    );
    let defaults = defaults()?;
    let all: Vec<_> = defaults
        .iter()
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    ensure!(
        Config::parse(&all.join("\n"))? == Config::default(),
        "{all:#?} is not the default"
    );
    // Every field of Config, by name: Debug is derived. A table's keys have its name in front.
    let config = format!("{:?}", Config::default());
    let fields = config.split_once('{').context("Config")?.1;
    let fields = fields
        .split([' ', '{', '}'])
        .filter_map(|word| word.strip_suffix(':'));
    let fields: Vec<_> = fields.collect();
    let keys = defaults.iter().flat_map(|(key, _)| key.split('.'));
    let keys: Vec<_> = keys.collect();
    ensure!(keys == fields, "keys {keys:?}, fields {fields:?}");
    Ok(())
}

#[test]
fn readme_and_manual_know_every_key_and_its_default() -> Result<()> {
    let readme = text("README.md")?;
    let manual = text("packaging/man/virt-ferry.toml.5")?
        .replace("\\-", "-")
        .replace("\\(dq", "\"");
    for (key, value) in defaults()? {
        let row = format!("| `{key}` | `{value}` |");
        ensure!(readme.contains(&row), "README.md has no {row}");
        ensure!(
            manual.contains(&format!(".BR {key} ")),
            "the manual page has no {key}"
        );
        let page = manual
            .split(".TP\n")
            .find(|part| part.starts_with(&format!(".BR {key} ")));
        ensure!(
            page.is_some_and(|page| page.contains(&value)),
            "the manual page has no {value}"
        );
    }
    Ok(())
}

/// What is written for people, in Markdown.
const PAGES: [&str; 5] = [
    "README.md",
    "docs/cold.md",
    "packaging/README.md",
    "tests/guests/README.md",
    "xml-schemas/README.md",
];

/// What stands between `begin` and `end`, each time.
fn between<'a>(text: &'a str, begin: &str, end: char) -> Vec<&'a str> {
    let parts = text.split(begin).skip(1);
    parts.filter_map(|part| Some(part.split_once(end)?.0)).collect()
}

#[test]
fn what_a_page_links_to_is_there() -> Result<()> {
    for page in PAGES {
        let (text, directory) = (text(page)?, checkout().join(page));
        let directory = directory.parent().context("a directory")?;
        for link in between(&text, "](", ')') {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if file.starts_with("https:") {
                continue;
            }
            let there = match file {
                "" => checkout().join(page),
                file => directory.join(file),
            };
            ensure!(there.exists(), "{page}: there is no {link}");
            // As it is made of a heading's words.
            let headings = match heading {
                "" => continue,
                _ => fs::read_to_string(&there)?,
            };
            let mut headings = headings.lines().filter(|line| line.starts_with('#'));
            ensure!(
                headings.any(|line| line
                    .trim_start_matches('#')
                    .trim()
                    .to_lowercase()
                    .replace(' ', "-")
                    == heading),
                "{page}: {link} has no such heading"
            );
        }
    }
    Ok(())
}

/// Blocks of commands begin with "```sh" or another word and end with "```": one that lost its first line turns the rest of
/// the page inside out.
#[test]
fn blocks_of_commands_have_a_beginning_and_an_end() -> Result<()> {
    for page in PAGES {
        let mut inside = false;
        for (number, line) in text(page)?.lines().enumerate() {
            if let Some(language) = line.strip_prefix("```") {
                ensure!(
                    inside == language.is_empty(),
                    "{page}, line {}: a block begins or ends where it should not",
                    number + 1
                );
                inside = !inside;
            }
        }
        ensure!(!inside, "{page} ends in a block of commands");
    }
    Ok(())
}

#[test]
fn the_command_that_shows_a_claim_finds_a_test() -> Result<()> {
    // As tests/run and cargo's tests have their names, roughly: file::function.
    let mut tests = Vec::new();
    for part in ["driver", "hooks", "tests"] {
        for file in files(&checkout().join(part))? {
            let Some(module) = file.strip_suffix(".rs") else {
                continue;
            };
            let module = module.replace('/', "::");
            for after in text(&format!("{part}/{file}"))?.split("#[test]").skip(1) {
                tests.extend(
                    between(after, "fn ", '(')
                        .first()
                        .map(|name| format!("{module}::{name}")),
                );
            }
        }
    }
    ensure!(tests.len() > 200, "only {} tests were found", tests.len());
    let mut claims = 0;
    for page in PAGES {
        // A command may go over the end of a line.
        let text = text(page)?.replace("\n  ", " ").replace('\n', " ");
        for pattern in between(&text, "`tests/run ", '`') {
            let plain = pattern
                .chars()
                .all(|letter| letter == '_' || letter.is_ascii_alphanumeric());
            ensure!(
                !plain || tests.iter().any(|test| test.contains(pattern)),
                "{page}: no test has {pattern} in its name"
            );
            claims += usize::from(plain);
        }
    }
    ensure!(claims > 50, "only {claims} commands were found");
    Ok(())
}

#[test]
fn manual_pages_are_sound() -> Result<()> {
    if !there_is("groff", "groff-base") {
        return Ok(());
    }
    for page in ["virt-ferry.1", "virt-ferry.toml.5", "virt-ferry-engine.8"] {
        let output = Command::new("groff")
            .args(["-ww", "-man", "-Tutf8"])
            .arg(checkout().join("packaging/man").join(page))
            .output()
            .context("groff")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "{page}: {said}");
        ensure!(output.stdout.len() > 1000, "{page} is empty");
    }
    Ok(())
}

#[test]
fn what_a_person_starts_explains_itself() -> Result<()> {
    // One that does not know --help begins its work: ended soon.
    let said = |program: &str, argument: &str| {
        Command::new("timeout")
            .args(["--kill-after=5", "10"])
            .arg(checkout().join(program))
            .arg(argument)
            .output()
            .with_context(|| program.to_owned())
    };
    for program in [
        "tests/run",
        "tests/demo",
        "tests/bench",
        "tests/lab",
        "packaging/install",
    ] {
        let output = said(program, "--help")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && text.starts_with(&format!("Usage: {program}")),
            "{program}: {} {text}",
            output.status
        );
    }
    for program in ["tests/run", "tests/lab", "packaging/install"] {
        let output = said(program, "--no-such-option")?;
        let status = output.status.code();
        ensure!(
            matches!(status, Some(1 | 2)) && output.stdout.is_empty(),
            "{program}: {status:?}"
        );
    }
    Ok(())
}

#[test]
fn an_older_kernel_is_told_before_anything_is_built() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let uname = directory.path().join("uname");
    fs::write(&uname, "#!/bin/sh\necho 6.1.0-41-amd64\n")?;
    fs::set_permissions(&uname, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH")?);
    let output = Command::new("timeout")
        .args(["--kill-after=5", "10"])
        .arg(checkout().join("tests/demo"))
        .env("PATH", path)
        .output()
        .context("tests/demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("Linux 6.1.0-41-amd64") && output.stdout.is_empty(),
        "{}: {said}",
        output.status
    );
    Ok(())
}

/// All files below a directory, from there.
fn files(directory: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path.strip_prefix(directory)?.display().to_string()),
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A host to install on: a directory, and one of what was built.
struct Installed {
    directory: tempfile::TempDir,
}

impl Installed {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let built = directory.path().join("built");
        fs::create_dir(&built)?;
        for name in [
            "libvirt_driver_ferry.so",
            "virt-ferry-engine",
            "virt-ferry",
            "virt-ferry-hook",
        ] {
            fs::write(built.join(name), name)?;
        }
        Ok(Self { directory })
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// The installer, run with these programs in front.
    fn installer(&self, front: &[&str], more: &[&str]) -> Command {
        let mut words: Vec<_> = front.iter().map(|word| PathBuf::from(*word)).collect();
        words.push(checkout().join("packaging/install"));
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .arg("--destdir")
            .arg(self.root())
            .arg("--from")
            .arg(self.directory.path().join("built"))
            .args(more);
        command
    }

    /// What it says.
    fn run(&self, more: &[&str]) -> Result<String> {
        let output = self.installer(&[], more).output().context("packaging/install")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "{more:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A file of the host.
    fn write(&self, path: &str, text: &str) -> Result<PathBuf> {
        let file = self.root().join(path);
        fs::create_dir_all(file.parent().context("a path")?)?;
        fs::write(&file, text)?;
        Ok(file)
    }
}

#[test]
fn it_is_not_uninstalled_below_those_who_need_it() -> Result<()> {
    let host = Installed::new()?;
    host.run(&[])?;
    let unit = host
        .root()
        .join("usr/lib/systemd/system/var-lib-libvirt-qemu-ram.mount");
    let hook = host.root().join("etc/libvirt/hooks/qemu.d/virt-ferry");

    // A guest between two hosts: nothing goes, least of all its fence; wherever journals are.
    for (configuration, journal) in [
        ("", "var/lib/virt-ferry/cold/1.json"),
        (
            "state_directory = \"/srv/journals\"\n",
            "srv/journals/cold/2.json",
        ),
    ] {
        host.write("etc/virt-ferry/virt-ferry.toml", configuration)?;
        let journal = host.write(journal, "{}")?;
        let before = files(&host.root())?;
        let output = host.installer(&[], &["--uninstall"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success()
                && said.contains("virt-ferry recover")
                && said.contains(&journal.display().to_string()),
            "{said}"
        );
        ensure!(files(&host.root())? == before, "something went");
        fs::remove_file(journal)?;
    }

    // Guests with memory in files, defined or running: they are named, and the tmpfs stays.
    let memory = "<domain>\n  <memoryBacking>\n    <source type='file'/>\n  </memoryBacking>\n</domain>\n";
    let defined = host.write("etc/libvirt/qemu/web.xml", memory)?;
    let runs = host.write("run/libvirt/qemu/mail.xml", memory)?;
    host.write(
        "etc/libvirt/qemu/db.xml",
        "<domain><source file='/a'/></domain>\n",
    )?;
    let said = host.run(&["--uninstall"])?;
    ensure!(
        said.contains("\n  mail\n  web\n") && !said.contains("db") && unit.exists() && !hook.exists(),
        "{said}"
    );
    fs::remove_file(defined)?;
    fs::remove_file(runs)?;

    // A mounted one stays as well.
    fs::create_dir_all(host.root().join("var/lib/libvirt/qemu/ram"))?;
    let mount = format!(
        "mount -t tmpfs ram {}/var/lib/libvirt/qemu/ram && exec \"$@\"",
        host.root().display()
    );
    let front = ["unshare", "--mount", "sh", "-c", &mount, "sh"];
    let output = host.installer(&front, &["--uninstall"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("is mounted") && unit.exists(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );

    // Nobody needs it: it goes, and the link by which it was enabled.
    let wants = host
        .root()
        .join("etc/systemd/system/libvirtd.service.wants/var-lib-libvirt-qemu-ram.mount");
    fs::create_dir_all(wants.parent().context("a path")?)?;
    std::os::unix::fs::symlink("/usr/lib/systemd/system/var-lib-libvirt-qemu-ram.mount", &wants)?;
    host.run(&["--uninstall"])?;
    ensure!(!unit.exists() && wants.symlink_metadata().is_err(), "it is left");
    Ok(())
}

#[test]
fn there_is_a_hook_at_each_moment_of_an_upgrade() -> Result<()> {
    let host = Installed::new()?;
    host.run(&[])?;
    // The program that brings the new one into place finds the old one there.
    let (programs, seen) = (
        host.directory.path().join("bin"),
        host.directory.path().join("seen"),
    );
    fs::create_dir(&programs)?;
    let mv = programs.join("mv");
    let script = "#!/bin/sh\nfor target; do :; done\ntest -x \"$target\" && echo \"$target\" >>SEEN\nPATH=${PATH#*:} exec mv \"$@\"\n";
    fs::write(&mv, script.replace("SEEN", &seen.display().to_string()))?;
    fs::set_permissions(&mv, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
    let output = host.installer(&[], &[]).env("PATH", path).output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seen = fs::read_to_string(&seen).unwrap_or_default();
    for program in [
        "etc/libvirt/hooks/qemu.d/virt-ferry",
        "usr/lib/virt-ferry/libvirt_driver_ferry.so",
        "usr/lib/virt-ferry/virt-ferry-engine",
    ] {
        ensure!(
            seen.lines().any(|line| line.ends_with(program)),
            "{program}: {seen}"
        );
    }
    // libvirt runs all there is in that directory.
    let hooks = files(&host.root().join("etc/libvirt/hooks"))?;
    ensure!(hooks == ["qemu.d/virt-ferry"], "{hooks:?}");
    Ok(())
}

#[test]
fn a_package_can_let_apparmor_start_the_engine() -> Result<()> {
    let host = Installed::new()?;
    // A package is made where there are no profiles; its scripts run where there are.
    host.run(&["--prefix", "/usr"])?;
    ensure!(!host.root().join("etc/apparmor.d").exists());
    host.write("etc/apparmor.d/usr.sbin.virtqemud", "profile virtqemud {}\n")?;
    let rule = host.root().join("etc/apparmor.d/local/usr.sbin.virtqemud");
    for (word, there) in [("add", true), ("add", true), ("remove", false)] {
        let output = Command::new(host.root().join("usr/lib/virt-ferry/apparmor"))
            .arg(word)
            .env("DESTDIR", host.root())
            .output()
            .context("apparmor")?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let rules = fs::read_to_string(&rule).unwrap_or_default();
        let once = rules
            .matches("/usr/lib/virt-ferry/virt-ferry-engine PUx,")
            .count();
        ensure!(once == usize::from(there), "{word}: {rules}");
    }
    Ok(())
}

#[test]
fn what_the_installer_brings_it_takes_away() -> Result<()> {
    let host = Installed::new()?;
    let (root, run) = (host.root(), |more: &[&str]| host.run(more));
    let local = root.join("etc/apparmor.d/local/usr.sbin.libvirtd");
    fs::create_dir_all(local.parent().context("a path")?)?;
    fs::write(
        root.join("etc/apparmor.d/usr.sbin.libvirtd"),
        "profile libvirtd {}\n",
    )?;
    fs::write(&local, "# theirs\n")?;
    let before = files(&root)?;

    // Twice: an upgrade.
    run(&[])?;
    run(&[])?;
    let installed = files(&root)?;
    let default = Config::default();
    for path in [
        default.engine.strip_prefix("/")?.to_string_lossy().as_ref(),
        "usr/lib/virt-ferry/libvirt_driver_ferry.so",
        "usr/bin/virt-ferry",
        "etc/libvirt/hooks/qemu.d/virt-ferry",
        "usr/lib/systemd/system/libvirtd.service.d/virt-ferry.conf",
        "usr/lib/systemd/system/virtqemud.service.d/virt-ferry.conf",
        ferry_contract::config::PATH.trim_start_matches('/'),
    ] {
        ensure!(
            installed.iter().any(|installed| installed == path),
            "no {path} in {installed:#?}"
        );
    }
    for daemon in ["libvirtd", "virtqemud"] {
        let unit = root.join(format!(
            "usr/lib/systemd/system/{daemon}.service.d/virt-ferry.conf"
        ));
        let unit = fs::read_to_string(unit)?;
        let settings: Vec<_> = unit.lines().filter(|line| !line.starts_with('#')).collect();
        let preload = "Environment=LD_PRELOAD=/usr/lib/virt-ferry/libvirt_driver_ferry.so";
        ensure!(settings == ["[Service]", preload], "{settings:?}");
    }
    let rules = fs::read_to_string(&local)?;
    ensure!(
        rules.starts_with("# theirs\n") && rules.matches("virt-ferry-engine PUx,").count() == 1,
        "{rules}"
    );
    let configuration = root.join("etc/virt-ferry/virt-ferry.toml");
    ensure!(
        Config::parse(&fs::read_to_string(&configuration)?)? == default,
        "not the defaults"
    );

    run(&["--uninstall"])?;
    ensure!(files(&root)? == before, "left: {:#?}", files(&root)?);
    ensure!(
        fs::read_to_string(&local)? == "# theirs\n",
        "AppArmor's rules are not as before"
    );

    // Elsewhere, the engine is found by the configuration; one that was changed stays.
    run(&["--prefix", "/opt"])?;
    let changed = fs::read_to_string(&configuration)? + "streams = 2\n";
    ensure!(
        Config::parse(&changed)?.engine == Path::new("/opt/lib/virt-ferry/virt-ferry-engine"),
        "{changed}"
    );
    fs::write(&configuration, &changed)?;
    run(&["--prefix", "/opt"])?;
    ensure!(
        fs::read_to_string(&configuration)? == changed,
        "the configuration was overwritten"
    );
    let said = run(&["--prefix", "/opt", "--uninstall"])?;
    ensure!(said.contains("was changed and stays"), "{said}");
    Ok(())
}
