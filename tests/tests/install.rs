//! The installer: what it brings it takes away, and neither below those who need it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context, Result};
use ferry_contract::config::Config;
use ferry_tests::checkout::{checkout, files};

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
            "# state_directory = \"/srv/journals\"\n",
            "var/lib/virt-ferry/cold/1.json",
        ),
        (
            "state_directory = \"/srv/journals\"\n",
            "srv/journals/cold/2.json",
        ),
        (
            "\tstate_directory='/srv/a # b'  # ours\r\n",
            "srv/a # b/cold/3.json",
        ),
        (
            "\"state_directory\"\t=\"/srv/journals\"#\"\n",
            "srv/journals/cold/4.json",
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

    // Nor where it is not known for sure where journals are.
    for configuration in [
        "state_directory = \"/srv/\\u006aournals\"\n",
        "state_directory = \"\"\"\n/srv/journals\"\"\"\n",
        "state_directory = \"journals\"\n",
        "state_directory = \"/srv/a\"\nstate_directory = \"/srv/b\"\n",
    ] {
        host.write("etc/virt-ferry/virt-ferry.toml", configuration)?;
        let before = files(&host.root())?;
        let output = host.installer(&[], &["--uninstall"]).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && said.contains("state_directory") && files(&host.root())? == before,
            "{configuration}: {said}"
        );
    }
    host.write("etc/virt-ferry/virt-ferry.toml", "")?;

    // Guests with memory in files, defined or running: they are named, and the tmpfs stays.
    let memory = "<domain>\n  <memoryBacking>\n    <source type='file'/>\n  </memoryBacking>\n</domain>\n";
    let defined = host.write("etc/libvirt/qemu/web.xml", memory)?;
    let runs = host.write("run/libvirt/qemu/mail.xml", memory)?;
    // Any access is such memory as well, but for a memfd and huge pages.
    let access = "<access mode='shared'/>";
    let other = [
        ("access", access.to_owned()),
        ("cell", "<cell id='0' cpus='0' memAccess='shared'/>".into()),
        ("dimm", "<memory model='dimm' access='private'>".into()),
        ("db", "<source file='/a'/>".into()),
        ("memfd", format!("<source type='memfd'/>{access}")),
        ("huge", format!("<hugepages/>{access}")),
    ];
    let mut written = vec![defined, runs];
    for (name, memory) in other {
        let text = format!("<domain>{memory}</domain>\n");
        written.push(host.write(&format!("etc/libvirt/qemu/{name}.xml"), &text)?);
    }
    let said = host.run(&["--uninstall"])?;
    ensure!(
        said.contains(":\n  access\n  cell\n  dimm\n  mail\n  web\n") && unit.exists() && !hook.exists(),
        "{said}"
    );
    for file in written {
        fs::remove_file(file)?;
    }

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
