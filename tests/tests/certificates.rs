//! `virsh migrate --tls`: libvirt's own certificates protect what the engines say to each other, and are checked.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};

use anyhow::{ensure, Context, Result};
use ferry_tests::authority::{Authority, Purpose, Validity};
use ferry_tests::fault::names;
use ferry_tests::guest::Rate;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{said, usual, Scene};
use ferry_tests::timeline::Role;

/// Where libvirt looks for certificates unless it is told something else.
const DEFAULT: &str = "/etc/pki/qemu";

/// The same authority's certificates on all hosts, as an administrator should have put them there.
fn certify(authority: &Authority, lab: &Lab, directory: &str) -> Result<()> {
    for host in lab.hosts() {
        certify_host(authority, host, directory)?;
    }
    Ok(())
}

fn certify_host(authority: &Authority, host: &Host, directory: &str) -> Result<()> {
    let there = host.path(directory);
    authority.trust(&there)?;
    let (name, address) = (host.name(), host.address());
    authority.issue(&there, Purpose::Server, name, &[name, &address], Validity::Good)?;
    authority.issue(
        &there,
        Purpose::Client,
        &format!("client of {name}"),
        &[],
        Validity::Good,
    )
}

/// Both ends' own reports say that the last move from one host to the other was protected by these certificates.
fn was_certified(lab: &Lab, from: &Host, to: &Host) -> Result<()> {
    lab.assert_clean(1)?;
    lab.assert_clean(2)?;
    for (host, role, other) in [
        (
            from,
            Role::Source,
            format!("the destination's certificate: CN={}", to.name()),
        ),
        (
            to,
            Role::Destination,
            format!("the source's certificate: CN=client of {}", from.name()),
        ),
    ] {
        let timeline = host.last_timeline(role)?;
        ensure!(
            timeline.encryption.as_deref() == Some("TLS 1.3 with libvirt's certificates"),
            "{}: {:?}",
            host.name(),
            timeline.encryption
        );
        for words in [&*other, "signed by CN=the lab", "number 2b:ad:ca:fe"] {
            ensure!(
                timeline.notes(words),
                "{}: no '{words}' in {:?}",
                host.name(),
                timeline.events
            );
        }
    }
    Ok(())
}

#[test]
fn tls_is_libvirts_own() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let authority = Authority::new("the lab", Validity::Good)?;
        certify(&authority, lab, DEFAULT)?;
        let scene = Scene::start(lab, one, usual("certified"), 1)?;
        scene.move_to(one, two, &["--tls", "--parallel"])?;
        was_certified(lab, one, two)?;
        scene.move_to(two, one, &["--p2p", "--tls", "--tls-destination", "host1"])?;
        was_certified(lab, two, one)?;

        // Elsewhere, and nobody asks who comes. libvirt takes the first of two lines.
        let configured = |line: &str| -> Result<()> {
            for host in [one, two] {
                let conf = host.path("/etc/libvirt/qemu.conf");
                fs::write(&conf, line.to_owned() + &fs::read_to_string(&conf)?)?;
                host.restart_libvirtd(false)?;
            }
            Ok(())
        };
        for host in [one, two] {
            certify_host(&authority, host, "/etc/pki/ours")?;
            fs::remove_dir_all(host.path(DEFAULT))?;
        }
        configured("migrate_tls_x509_cert_dir = \"/etc/pki/ours\"\nmigrate_tls_x509_verify = 0\n")?;
        fs::remove_file(one.path("/etc/pki/ours/client-cert.pem"))?;
        scene.move_to(one, two, &["--tls"])?;
        ensure!(two
            .last_timeline(Role::Destination)?
            .notes("the source has shown no certificate"));

        // Where libvirt insists on TLS of its own, it is not got round.
        configured("migrate_tls_force = 1\n")?;
        for options in [&[][..], &["--p2p"]] {
            let said = two.begin_migration("certified", one, options)?.fails()?;
            names(&said, &["VIR_MIGRATE_TLS"])?;
            scene.is_unharmed(two)?;
        }
        scene.move_to(two, one, &["--tls"])?;
        ensure!(
            said(
                two,
                "libvirt's own migration: libvirt is to protect QEMU's own stream"
            ) == 1
        );
        one.assert_moved_away(2)?;
        two.assert_moved_away(1)
    })
}

#[test]
fn certificates_that_are_not_right() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let (authority, other) = (
            Authority::new("the lab", Validity::Good)?,
            Authority::new("somebody", Validity::Good)?,
        );
        let scene = Scene::start(lab, one, usual("uncertified"), 1)?;
        let [here, there] = [one, two].map(|host| host.path(DEFAULT));
        let server = |authority: &Authority, names: &[&str], validity| {
            authority.issue(&there, Purpose::Server, "host2", names, validity)
        };
        type Change<'a> = Box<dyn Fn() -> Result<()> + 'a>;
        let cases: [(&str, Change, &[&str], &[&str]); 7] = [
            (
                "no certificate at the destination",
                Box::new(|| Ok(fs::remove_file(there.join("server-cert.pem"))?)),
                &[],
                &["cannot read /etc/pki/qemu/server-cert.pem", "(on host host2)"],
            ),
            (
                "no authority at the source",
                Box::new(|| Ok(fs::remove_file(here.join("ca-cert.pem"))?)),
                &["--p2p"],
                &["cannot read /etc/pki/qemu/ca-cert.pem", "(on host host1)"],
            ),
            (
                "another authority at the source",
                Box::new(|| {
                    other.trust(&here)?;
                    other.issue(&here, Purpose::Client, "client of host1", &[], Validity::Good)
                }),
                &[],
                &[
                    "192.168.77.12",
                    "no authority that is trusted has signed it",
                    "/etc/pki/qemu/ca-cert.pem",
                    "(on host host1)",
                ],
            ),
            (
                "a certificate for another host",
                Box::new(|| server(&authority, &["host3"], Validity::Good)),
                &["--p2p"],
                &[
                    "it is not for 192.168.77.12",
                    "host3",
                    "--tls-destination",
                    "(on host host1)",
                ],
            ),
            (
                "a certificate that has expired",
                Box::new(|| server(&authority, &["192.168.77.12"], Validity::Expired)),
                &[],
                &["/etc/pki/qemu/server-cert.pem", "expired", "(on host host2)"],
            ),
            (
                "a source without a certificate",
                Box::new(|| Ok(fs::remove_file(here.join("client-key.pem"))?)),
                &["--p2p"],
                &[
                    "192.168.77.12",
                    "migrate_tls_x509_verify",
                    "client-cert.pem",
                    "(on host host1)",
                ],
            ),
            (
                "another host than asked for",
                Box::new(|| Ok(())),
                &["--tls-destination", "host3"],
                &["it is not for host3", "host2", "(on host host1)"],
            ),
        ];
        for (what, change, options, words) in &cases {
            certify(&authority, lab, DEFAULT)?;
            change()?;
            let options = [&["--tls"], *options].concat();
            let said = one.begin_migration("uncertified", two, &options)?.fails()?;
            println!("{what}: {said}");
            names(&said, words).context(*what)?;
            scene.is_unharmed(one).context(*what)?;
        }
        certify(&authority, lab, DEFAULT)?;
        scene.move_to(one, two, &["--tls"])?;
        was_certified(lab, one, two)?;
        one.assert_moved_away(1)
    })
}

/// Who listens on both hosts' links for a text.
struct Eavesdropper {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Eavesdropper {
    fn of(lab: &Lab, text: &str) -> Result<Self> {
        let script = format!(
            "import select, socket, sys\n\
             links = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) for _ in range(2)]\n\
             for link, name in zip(links, ('host1', 'host2')):\n\
             \x20   link.setsockopt(socket.SOL_SOCKET, 33, 64 << 20) # SO_RCVBUFFORCE: nothing is missed on a busy machine\n\
             \x20   link.bind((name, 0))\n\
             print('listening', flush=True)\n\
             heard = packets = 0\n\
             asked = False\n\
             while True:\n\
             \x20   # Asked for what it has heard, it hears what has come before: on a busy machine that is most of it.\n\
             \x20   ready, _, _ = select.select(links + ([] if asked else [sys.stdin]), [], [], 0 if asked else None)\n\
             \x20   if asked and not ready: break\n\
             \x20   for file in ready:\n\
             \x20       if file is sys.stdin:\n\
             \x20           asked = True\n\
             \x20           continue\n\
             \x20       packets += 1\n\
             \x20       heard += b'{text}' in file.recv(1 << 17)\n\
             print(heard, packets)\n"
        );
        let mut process = lab
            .switch()
            .command("python3")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut output = BufReader::new(process.stdout.take().context("its output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(line == "listening\n", "it does not listen: {line}");
        Ok(Self { process, output })
    }

    /// How many packets had the text in them, and how many there were.
    fn heard(mut self) -> Result<[u64; 2]> {
        self.process.stdin.take().context("its input")?.write_all(b"\n")?;
        let mut counts = String::new();
        self.output.read_to_string(&mut counts)?;
        ensure!(self.process.wait()?.success(), "it failed");
        let numbers = counts
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<Vec<u64>, _>>()?;
        numbers.try_into().map_err(|counts| anyhow::anyhow!("{counts:?}"))
    }
}

/// libvirt copies the disk, and what it copies is protected as well: such a migration is libvirt's own. On the network is
/// nothing of it to be read.
#[test]
fn disks_are_protected_as_well() -> Result<()> {
    const DISK: &str = "/var/lib/libvirt/images/secret.raw";
    const SECRET: &str = "what is on this disk is for no other eyes";
    const MIB: u64 = 1 << 20;
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        certify(&Authority::new("the lab", Validity::Good)?, lab, DEFAULT)?;
        let image = |host: &Host| -> Result<PathBuf> {
            let path = host.path(DISK);
            fs::create_dir_all(path.parent().context("a directory")?)?;
            File::create(&path)?.set_len(48 * MIB)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
            Ok(path)
        };
        // Behind what the guest writes.
        let secret = File::options().write(true).open(image(one)?)?;
        secret.write_all_at(SECRET.repeat(50_000).as_bytes(), 32 * MIB)?;
        image(two)?;
        let guest = usual("secret").disk(DISK, "raw").disk_load(16, Rate(40));
        let scene = Scene::start(lab, one, guest, 1)?;
        for (from, to, options, clear) in [
            (one, two, &["--copy-storage-all", "--tls"][..], false),
            (two, one, &["--p2p", "--copy-storage-all", "--tls"], false),
            // What would be heard if there were anything to be heard.
            (one, two, &["--copy-storage-all"], true),
        ] {
            image(to)?;
            let eavesdropper = Eavesdropper::of(lab, SECRET)?;
            scene
                .move_to(from, to, options)
                .with_context(|| format!("{options:?}"))?;
            let [heard, packets] = eavesdropper.heard()?;
            println!("{options:?}: {heard} of {packets} packets");
            ensure!(
                packets > 1000 && clear == (heard > 0),
                "{heard} of {packets} packets"
            );
            let copied = fs::read(to.path(DISK))?;
            ensure!(
                copied[32 * MIB as usize..].starts_with(SECRET.as_bytes()),
                "it was not copied"
            );
        }
        let own = "libvirt's own migration: libvirt protects the disks it copies only";
        ensure!(
            said(one, own) == 1 && said(two, own) == 1,
            "the logs do not say why"
        );
        one.assert_moved_away(1)?;
        two.assert_moved_away(0)
    })
}
