//! A guest as libvirt domain XML.

use std::fmt::Write;

use super::{Accel, Backing, Guest, Kind, Machine};

/// Text fit for an attribute or an element.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

impl Guest {
    /// The domain XML. The serial log is appended to, so that it goes on at the destination of a migration; a guest that resets
    /// or panics ends.
    pub fn xml(&self) -> String {
        let kind = match self.accel {
            Accel::Tcg => "qemu",
            Accel::Kvm => "kvm",
        };
        let machine = match self.machine {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
        };
        let Guest {
            memory_mib, vcpus, ..
        } = self;
        let (name, room, boot, backing, cells, devices) = (
            escaped(&self.name),
            self.room_xml(),
            self.boot_xml(),
            self.backing_xml(),
            self.cells_xml(),
            self.devices_xml(),
        );
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
{room}  <memory unit='MiB'>{memory_mib}</memory>
{backing}  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
{boot}  </os>
  <features><acpi/><apic/></features>
{cells}  <clock offset='utc'><timer name='hpet' present='no'/></clock>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
{devices}  </devices>
</domain>
"
        )
    }

    fn path(&self, name: &str) -> String {
        escaped(&self.dir.join(name).to_string_lossy())
    }

    fn room_xml(&self) -> String {
        match self.room_mib {
            0 => String::new(),
            room => format!(
                "  <maxMemory slots='8' unit='MiB'>{}</maxMemory>\n",
                self.memory_mib + room
            ),
        }
    }

    fn cells_xml(&self) -> String {
        if self.cells == 0 {
            return String::new();
        }
        let (vcpus, mib) = (self.vcpus / self.cells, self.memory_mib / u64::from(self.cells));
        let cells = (0..self.cells).map(|cell| {
            let (first, last) = (cell * vcpus, (cell + 1) * vcpus - 1);
            format!("<cell id='{cell}' cpus='{first}-{last}' memory='{mib}' unit='MiB' memAccess='shared'/>")
        });
        format!("  <cpu><numa>{}</numa></cpu>\n", cells.collect::<String>())
    }

    fn boot_xml(&self) -> String {
        let firmware = match self.uefi {
            // Debian's package ovmf.
            true => {
                "    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\n    \
                 <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>\n"
            }
            false => "",
        };
        firmware.to_owned() + &self.kernel_xml()
    }

    fn kernel_xml(&self) -> String {
        match &self.kind {
            Kind::Linux(config) => format!(
                "    <kernel>{}</kernel>\n    <initrd>{}</initrd>\n    <cmdline>{}</cmdline>\n",
                self.path("vmlinuz"),
                self.path("initrd"),
                escaped(&Guest::command_line(config))
            ),
            Kind::Boot { .. } => "    <boot dev='hd'/>\n".to_owned(),
        }
    }

    fn backing_xml(&self) -> String {
        let inner = match self.backing {
            Backing::File => "<source type='file'/><access mode='shared'/>",
            Backing::PrivateFile => "<source type='file'/>",
            Backing::Memfd => "<source type='memfd'/><access mode='shared'/>",
            Backing::Anonymous => "<source type='anonymous'/>",
            Backing::HugePages => "<hugepages/><access mode='shared'/>",
            Backing::Unsaid => return String::new(),
        };
        let allocation = if self.immediate {
            "<allocation mode='immediate'/>"
        } else {
            ""
        };
        format!("  <memoryBacking>{inner}{allocation}</memoryBacking>\n")
    }

    fn devices_xml(&self) -> String {
        let mut xml = String::from("    <controller type='usb' model='none'/>\n");
        let mut add = |line: std::fmt::Arguments<'_>| {
            // Writing into a String does not fail.
            let _ = writeln!(xml, "    {line}");
        };
        let mut letters = 'a'..='z';
        if let Kind::Boot { .. } = self.kind {
            letters.next();
            let disk = escaped(&self.boot_disk_in(&self.dir).to_string_lossy());
            add(format_args!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{disk}'/>\
                 <target dev='vda' bus='virtio'/><readonly/></disk>"
            ));
        }
        for (image, letter) in self.disks.iter().zip(letters) {
            add(format_args!(
                "<disk type='file' device='disk'><driver name='qemu' type='{}' cache='{}'/><source file='{}'/>\
                 <target dev='vd{letter}' bus='virtio'/></disk>",
                escaped(&image.format),
                escaped(&image.cache),
                escaped(&image.path.to_string_lossy())
            ));
        }
        if let Some(nic) = &self.nic {
            add(format_args!(
                "<interface type='bridge'><mac address='{}'/><source bridge='{}'/><model type='virtio'/></interface>",
                escaped(&nic.mac),
                escaped(&nic.bridge)
            ));
        }
        let log = escaped(&self.log_in(&self.dir).to_string_lossy());
        // Labelled by two hosts at once it would be refused at the destination: "which is already in use" (libvirt 11.3).
        add(format_args!(
            "<serial type='file'><source path='{log}' append='on'><seclabel model='dac' relabel='no'/></source>\
             <target port='0'/></serial>"
        ));
        let reporting = if self.free_page_reporting {
            " freePageReporting='on'"
        } else {
            ""
        };
        add(format_args!("<memballoon model='virtio'{reporting}/>"));
        for device in &self.devices {
            add(format_args!("{device}"));
        }
        xml
    }
}

#[cfg(test)]
mod tests {
    use super::super::Address;
    use super::*;

    #[test]
    fn names_and_paths_cannot_break_the_xml() {
        let xml = Guest::linux("a<b>&'c'").dir("/lab/\"x\"").xml();
        assert!(xml.contains("<name>a&lt;b&gt;&amp;&apos;c&apos;</name>"), "{xml}");
        assert!(xml.contains("/lab/&quot;x&quot;/vmlinuz"), "{xml}");
    }

    #[test]
    fn the_load_is_on_the_command_line_and_the_address_in_the_mac() {
        let address: Address = "192.168.77.101/24".parse().expect("address");
        let xml = Guest::linux("g").working_set(32).network("labbr0", address).xml();
        assert!(
            xml.contains("ferry.set=32") && xml.contains("ferry.ip=192.168.77.101/24"),
            "{xml}"
        );
        assert!(xml.contains("<mac address='52:54:00:a8:4d:65'/>"), "{xml}");
    }

    #[test]
    fn only_the_shared_file_is_the_default() {
        assert!(Guest::linux("g")
            .xml()
            .contains("<source type='file'/><access mode='shared'/>"));
        assert!(!Guest::linux("g")
            .backing(Backing::Unsaid)
            .xml()
            .contains("memoryBacking"));
    }
}
