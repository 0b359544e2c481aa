//! What is in the way of a cold migration is said before a byte moves, and everything stays as it was.

use std::fs;

use anyhow::{ensure, Context, Result};
use ferry_tests::cold::{same_files, serial, Content, Guest, Writer, IMAGES};
use ferry_tests::fault::names;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options, Plugin};
use ferry_tests::scene::PATIENCE;
use ferry_tests::wait::wait_until;

/// One guest, what it is made of, and what both hosts looked like before.
struct Scene<'a> {
    lab: &'a Lab,
    files: [Vec<String>; 2],
    digest: String,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let one = lab.host(1);
        Content::sparse(32).write(one, &disk())?;
        Guest::new("g").disk("vda", "raw", &disk()).define(one)?;
        Ok(Scene {
            lab,
            files: [one.guests_files()?, lab.host(2).guests_files()?],
            digest: one.sha256(&disk())?,
        })
    }

    /// A move of the guest is refused with these words, managed and peer-to-peer, and nothing has changed.
    fn refused(&self, mode: &[&str], words: &[&str]) -> Result<()> {
        let (one, two) = (self.lab.host(1), self.lab.host(2));
        let files = [one.guests_files()?, two.guests_files()?];
        for p2p in [&[][..], &["--p2p"]] {
            let said = one.underway("g", two, mode, p2p)?.fails()?;
            println!("{said}");
            names(&said, words)?;
            for (host, files) in [one, two].into_iter().zip(&files) {
                // An engine that was told to end removes its marks.
                wait_until("the host to be as before", PATIENCE, || {
                    Ok(same_files(files, &host.guests_files()?).is_ok())
                })
                .with_context(|| host.name().to_owned())?;
            }
            ensure!(two.state("g")?.is_none(), "host2 knows the guest");
            ensure!(one.sha256(&disk())? == self.digest, "the disk has changed");
        }
        Ok(())
    }

    /// In the end the guest moves, and comes back.
    fn moves(&self) -> Result<()> {
        let (one, two) = (self.lab.host(1), self.lab.host(2));
        // Until the engines of what was refused have ended.
        self.lab.assert_clean(1)?;
        self.lab.assert_clean(2)?;
        same_files(&self.files[0], &one.guests_files()?)?;
        same_files(&self.files[1], &two.guests_files()?)?;
        one.move_cold("g", two, &["--undefinesource"])?;
        two.move_cold("g", one, &["--undefinesource"])?;
        ensure!(one.sha256(&disk())? == self.digest, "the disk has changed");
        self.lab.assert_clean(1)?;
        self.lab.assert_clean(2)
    }
}

fn disk() -> String {
    format!("{IMAGES}/g.img")
}

const ALL: [&str; 4] = [
    "--offline",
    "--persistent",
    "--copy-storage-all",
    "--undefinesource",
];
const INC: [&str; 4] = [
    "--offline",
    "--persistent",
    "--copy-storage-inc",
    "--undefinesource",
];

#[test]
fn what_the_guest_is_at() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let one = lab.host(1);
        let scene = Scene::new(lab)?;
        serial(&lab.share().join("g.serial"))?;
        one.virsh(&["start", "g"])?;
        scene.refused(&ALL, &["guest g runs", "--live", "host1"])?;
        one.virsh(&["managedsave", "g"])?;
        scene.refused(&ALL, &["managed save", "virsh managedsave-remove g", "host1"])?;
        one.virsh(&["managedsave-remove", "g"])?;
        let writer = Writer::of(one, &disk())?;
        scene.refused(&ALL, &[&disk(), "host1"])?;
        drop(writer);
        scene.refused(&["--offline", "--copy-storage-all"], &["persistent"])?;
        // Never in clear where TLS was asked for, and never on another way than was asked for.
        let hosts = [one, lab.host(2)];
        hosts
            .iter()
            .try_for_each(|host| host.configure("encryption = \"never\"\n"))?;
        scene.refused(&[&ALL[..], &["--tls"]].concat(), &["--tls", "encrypted", "host1"])?;
        hosts.iter().try_for_each(|host| host.configure(""))?;
        let ways = [
            ["--migrateuri", "tcp://192.168.77.12"],
            ["--listen-address", "192.168.77.12"],
            ["--disks-port", "49300"],
        ];
        for way in ways {
            scene.refused(
                &[&ALL[..], &way].concat(),
                &["is not heeded", "migration_host", "host1"],
            )?;
        }
        scene.moves()
    })
}

#[test]
fn what_the_destination_has() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::new(lab)?;
        let remove = |host: &Host, path: &str| host.run(&["rm", path]);

        fs::write(two.path(disk()), "precious")?;
        scene.refused(&ALL, &[&disk(), "exists", "host2"])?;
        ensure!(fs::read_to_string(two.path(disk()))? == "precious");
        remove(two, &disk())?;

        // Everything at once: two disks without a directory or room, a CD that is not there.
        let (small, cd, lost) = ("/srv/small/b.img", "/srv/cd.iso", "/srv/nowhere/c.img");
        for path in [small, lost] {
            Content::dense(16, 10).write(one, path)?;
        }
        fs::write(one.path(cd), [1; 4096])?;
        two.run(&[
            "sh",
            "-ec",
            "mkdir -p /srv/small; mount -t tmpfs -o size=4m small /srv/small",
        ])?;
        one.virsh(&["undefine", "g"])?;
        let more = Guest::new("g").disk("vda", "raw", &disk()).disk("vdb", "raw", small).disk("vdc", "raw", lost).device(&format!(
            "<disk type='file' device='cdrom'><source file='{cd}'/><target dev='sda' bus='sata'/><readonly/></disk>"
        ));
        more.define(one)?;
        scene.refused(&ALL, &["/srv/small", "/srv/nowhere", cd, "host2"])?;
        two.run(&["umount", "/srv/small"])?;
        two.run(&["rmdir", "/srv/small"])?;

        one.virsh(&["undefine", "g"])?;
        one.run(&[
            "sh",
            "-ec",
            "mkdir -p /srv/pool; virsh pool-create-as pool dir --target /srv/pool",
        ])?;
        Content::sparse(8).write(one, "/srv/pool/v.img")?;
        one.virsh(&["pool-refresh", "pool"])?;
        Guest::new("g")
            .disk("vda", "raw", &disk())
            .volume("vdb", "pool", "v.img")
            .define(one)?;
        scene.refused(&ALL, &["vdb", "storage pool pool does not exist", "host2"])?;
        one.virsh(&["undefine", "g"])?;

        // A base of the same name that is another.
        let (base, top) = (format!("{IMAGES}/base.raw"), format!("{IMAGES}/top.qcow2"));
        Content::sparse(16).write(one, &base)?;
        Content::sparse(16).write(two, &base)?;
        one.run(&[
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top,
        ])?;
        Guest::new("g").disk("vda", "qcow2", &top).define(one)?;
        scene.refused(&INC, &[&base, "host2"])?;
        scene.refused(&ALL, &[&base, "exists", "host2"])?;
        one.virsh(&["undefine", "g"])?;

        for path in [small, lost, cd, "/srv/pool/v.img", &base, &top] {
            remove(one, path)?;
        }
        remove(two, &base)?;
        Guest::new("g").disk("vda", "raw", &disk()).define(one)?;
        // One that is there already: nothing of it is touched.
        Guest::new("g").define(two)?;
        let said = one.begin_cold("g", two, &["--undefinesource"])?.fails()?;
        names(&said, &["another guest of its name", "--dname", "host2"])?;
        two.virsh(&["undefine", "g"])?;
        scene.moves()
    })
}

/// Without the plug-in on the other side, the error is libvirt's own, or ours where ours is asked, and the guest stays.
#[test]
fn a_destination_without_virt_ferry() -> Result<()> {
    Lab::with(Options::default().plugin(Plugin::Source), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::new(lab)?;
        let said = one.begin_cold("g", two, &["--undefinesource"])?.fails()?;
        names(&said, &["offline migration cannot handle non-shared storage"])?;
        let said = one
            .begin_cold("g", two, &["--undefinesource", "--p2p"])?
            .fails()?;
        names(&said, &["has no virt-ferry", "host2"])?;
        one.has_shut_off("g")?;
        // Until its engines have ended.
        lab.assert_clean(1)?;
        same_files(&scene.files[0], &one.guests_files()?)?;
        one.boots(lab, "g")
    })
}
