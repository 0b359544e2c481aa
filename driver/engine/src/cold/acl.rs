//! Access control lists (acl(5)): who may use a file beside those that its mode speaks of.
//!
//! With one, the group's bits of the mode are the mask: the most that any of its users and groups may. A copy of the mode alone
//! would give that to the owning group, and leave to the named ones what others may. The kernel has a list in
//! `system.posix_acl_access` as a version and entries of tag, permissions and number, little-endian (Linux,
//! `uapi/linux/posix_acl_xattr.h`), and sets the mode by it. NFS 4 has lists of another kind, which are not copied.

use super::users;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const NAME: &std::ffi::CStr = c"system.posix_acl_access";
const VERSION: u32 = 2;
/// The longest attribute that the kernel takes, bytes (XATTR_SIZE_MAX).
const LONGEST: usize = 64 << 10;
/// Bytes of an entry.
const ENTRY: usize = 8;
/// Users and groups in one list: as many as an attribute holds beside owner, group, mask and others.
pub const MAX_NAMED: usize = (LONGEST - 4) / ENTRY - 4;

const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;
/// The number of who has none.
const NOBODY: u32 = u32::MAX;

/// A user or a group, and what it may: 0 to 7, as in a mode.
type Named<Id> = (Id, u8);

/// A list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acl<Id> {
    owner: u8,
    users: Vec<Named<Id>>,
    group: u8,
    groups: Vec<Named<Id>>,
    /// The most of all but owner and others.
    mask: u8,
    others: u8,
}

impl<Id> Acl<Id> {
    /// The mode for a file system without lists: nobody may more by it than by the list, whoever is a member of what.
    pub fn mode(&self) -> u32 {
        let all = |named: &[Named<Id>]| named.iter().fold(self.mask, |all, (_, may)| all & may);
        let (group, others) = match (self.users.is_empty(), self.groups.is_empty()) {
            (true, true) => (self.group & self.mask, self.others),
            (false, true) => (self.group & all(&self.users), self.others & all(&self.users)),
            (true, false) => (self.group & self.mask, self.others & all(&self.groups)),
            (false, false) => (
                self.group & all(&self.users),
                self.others & all(&self.users) & all(&self.groups),
            ),
        };
        [self.owner, group, others]
            .into_iter()
            .fold(0, |mode, may| mode << 3 | u32::from(may & 7))
    }

    /// Where the owning group is not known: its members are others now, and may no more than they might.
    pub fn without_group(self) -> Self {
        Self {
            group: 0,
            others: self.others & self.group & self.mask,
            ..self
        }
    }
}

impl Acl<u32> {
    /// That of a file; `None` where it has none but its mode.
    ///
    /// # Errors
    /// The system's, or it is none that this knows.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let mut value = vec![0u8; LONGEST];
        // SAFETY: the name ends with NUL, the buffer is as long as said.
        let length = unsafe {
            libc::fgetxattr(
                file.as_raw_fd(),
                NAME.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        let Ok(length) = usize::try_from(length) else {
            return unless_absent(None);
        };
        match value.get(..length).and_then(Self::decode) {
            Some(list) => Ok(Some(list)),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is of a kind that is not known here",
            )),
        }
    }

    /// Gives it to a file, and with it a mode; says whether there are lists on this file system.
    ///
    /// # Errors
    /// The system's.
    pub fn set(&self, file: &File) -> io::Result<bool> {
        let value = self.encode();
        // SAFETY: the name ends with NUL, the value is as long as said.
        let done = unsafe {
            libc::fsetxattr(
                file.as_raw_fd(),
                NAME.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            )
        };
        match done {
            0 => Ok(true),
            _ => unless_absent(false),
        }
    }

    /// By names: numbers differ from host to host.
    pub fn named(self) -> Acl<String> {
        let by = |named: Vec<Named<u32>>, name: fn(u32) -> String| {
            let named = named.into_iter();
            named.map(|(id, may)| (name(id), may)).collect()
        };
        Acl {
            owner: self.owner,
            users: by(self.users, users::user_name),
            group: self.group,
            groups: by(self.groups, users::group_name),
            mask: self.mask,
            others: self.others,
        }
    }

    pub(super) fn decode(value: &[u8]) -> Option<Self> {
        let (version, entries) = value.split_first_chunk()?;
        if u32::from_le_bytes(*version) != VERSION || entries.len() % ENTRY != 0 {
            return None;
        }
        let (mut users, mut groups, mut single) = (Vec::new(), Vec::new(), BTreeMap::new());
        for entry in entries.chunks_exact(ENTRY) {
            let &[tag, tag_high, may, 0, a, b, c, d] = entry else {
                return None;
            };
            let (tag, id) = (
                u16::from_le_bytes([tag, tag_high]),
                u32::from_le_bytes([a, b, c, d]),
            );
            match tag {
                _ if may > 7 => return None,
                USER => users.push((id, may)),
                NAMED_GROUP => groups.push((id, may)),
                OWNER | GROUP | MASK | OTHERS if single.insert(tag, may).is_none() => {}
                _ => return None,
            }
        }
        let group = *single.get(&GROUP)?;
        let mask = match single.get(&MASK) {
            Some(mask) => *mask,
            None if users.is_empty() && groups.is_empty() => group,
            None => return None,
        };
        Some(Self {
            owner: *single.get(&OWNER)?,
            users,
            group,
            groups,
            mask,
            others: *single.get(&OTHERS)?,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        let mut entry = |tag: u16, may: u8, id: u32| {
            value.extend(tag.to_le_bytes());
            value.extend(u16::from(may & 7).to_le_bytes());
            value.extend(id.to_le_bytes());
        };
        // The kernel takes them in this order only.
        entry(OWNER, self.owner, NOBODY);
        self.users.iter().for_each(|(id, may)| entry(USER, *may, *id));
        entry(GROUP, self.group, NOBODY);
        self.groups
            .iter()
            .for_each(|(id, may)| entry(NAMED_GROUP, *may, *id));
        entry(MASK, self.mask, NOBODY);
        entry(OTHERS, self.others, NOBODY);
        value
    }
}

impl Acl<String> {
    /// Bytes of it on the way.
    pub fn length(&self) -> usize {
        let all = self.users.iter().chain(&self.groups);
        all.map(|(name, _)| name.len() + ENTRY).sum()
    }

    /// Whether no file could have it.
    pub fn is_too_long(&self) -> bool {
        self.users.len() + self.groups.len() > MAX_NAMED
    }

    /// With this host's numbers, and who is not known here and left out.
    pub fn here(
        &self,
        user: impl Fn(&str) -> Option<u32>,
        group: impl Fn(&str) -> Option<u32>,
    ) -> (Acl<u32>, Vec<String>) {
        let (users, strangers) = known(&self.users, user);
        let (groups, unknown) = known(&self.groups, group);
        // Those of a group that is left out are others now.
        let others = unknown
            .iter()
            .fold(self.others, |others, (_, may)| others & may & self.mask);
        let list = Acl {
            owner: self.owner,
            users,
            group: self.group,
            groups,
            mask: self.mask,
            others,
        };
        let strangers = strangers.into_iter().map(|(name, _)| format!("user {name}"));
        let unknown = unknown.into_iter().map(|(name, _)| format!("group {name}"));
        (list, strangers.chain(unknown).collect())
    }
}

/// By numbers, each once, and those that have none.
fn known(
    named: &[Named<String>],
    id: impl Fn(&str) -> Option<u32>,
) -> (Vec<Named<u32>>, Vec<&Named<String>>) {
    let (mut known, mut unknown) = (BTreeMap::new(), Vec::new());
    for entry in named {
        let (name, may) = entry;
        match id(name) {
            Some(id) => *known.entry(id).or_insert(7) &= may,
            None => unknown.push(entry),
        }
    }
    (known.into_iter().collect(), unknown)
}

/// Takes a list away that a file has from its directory.
///
/// # Errors
/// The system's.
pub fn remove(file: &File) -> io::Result<()> {
    // SAFETY: the name ends with NUL.
    match unsafe { libc::fremovexattr(file.as_raw_fd(), NAME.as_ptr()) } {
        0 => Ok(()),
        _ => unless_absent(()),
    }
}

/// What is so where the last call has found no list, or a file system without.
fn unless_absent<T>(absent: T) -> io::Result<T> {
    match Errno::last() {
        Errno::ENODATA | Errno::EOPNOTSUPP | Errno::ENOSYS => Ok(absent),
        other => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `user::rw-,user:7:rwx,group::r--,group:8:-w-,mask::rw-,other::---`, as Linux has it.
    const LIST: [u8; 52] = [
        2, 0, 0, 0, //
        1, 0, 6, 0, 255, 255, 255, 255, //
        2, 0, 7, 0, 7, 0, 0, 0, //
        4, 0, 4, 0, 255, 255, 255, 255, //
        8, 0, 2, 0, 8, 0, 0, 0, //
        16, 0, 6, 0, 255, 255, 255, 255, //
        32, 0, 0, 0, 255, 255, 255, 255,
    ];

    fn list<Id>(users: Vec<Named<Id>>, groups: Vec<Named<Id>>) -> Acl<Id> {
        Acl {
            owner: 6,
            users,
            group: 4,
            groups,
            mask: 6,
            others: 4,
        }
    }

    #[test]
    fn a_list_is_read_as_it_is_written() {
        let expected = Acl {
            others: 0,
            ..list(vec![(7, 7)], vec![(8, 2)])
        };
        assert_eq!(Acl::decode(&LIST), Some(expected.clone()));
        assert_eq!(expected.encode(), LIST);
        // One of a mode alone.
        let short = [&LIST[..12], &LIST[20..28], &LIST[44..]].concat();
        assert_eq!(
            Acl::decode(&short).map(|list| (list.mask, list.mode())),
            Some((4, 0o640))
        );
        for length in 0..LIST.len() {
            assert_eq!(Acl::decode(&LIST[..length]), None, "{length}");
        }
        // Another version, more than rwx, a mask that is none of the known, and one too many.
        for (index, byte) in [(0, 1), (6, 8), (7, 1), (36, 64), (36, 4)] {
            let mut other = LIST;
            other[index] = byte;
            assert_eq!(Acl::decode(&other), None, "{index}");
        }
    }

    #[test]
    fn names_are_found_or_left_out_and_nobody_gains() {
        let named = |names: &[(&str, u8)]| names.iter().map(|(name, may)| (name.to_string(), *may)).collect();
        let theirs = list(
            named(&[("backup", 4), ("stranger", 0), ("alias", 2)]),
            named(&[("kvm", 6), ("unknown", 3)]),
        );
        let id = |name: &str| match name {
            "backup" | "alias" => Some(34),
            "kvm" => Some(104),
            _ => None,
        };
        let (here, lost) = theirs.here(id, id);
        // Two names of one number may what both may; a lost group's members no more than they might.
        let expected = Acl {
            others: 0,
            ..list(vec![(34, 0)], vec![(104, 6)])
        };
        assert_eq!(here, expected);
        assert_eq!(lost, ["user stranger", "group unknown"]);
        assert!(!theirs.is_too_long());
        let many = list(vec![(String::new(), 7); MAX_NAMED + 1], Vec::new());
        assert!(many.is_too_long() && many.length() > MAX_NAMED);
    }

    #[test]
    fn a_mode_alone_lets_nobody_do_more() {
        assert_eq!(list::<u32>(vec![], vec![]).mode(), 0o644);
        // Who was shut out may be of the group, or is one of the others.
        assert_eq!(list(vec![(7, 0)], vec![]).mode(), 0o600);
        assert_eq!(list(vec![], vec![(7, 2)]).mode(), 0o640);
        assert_eq!(list(vec![(7, 7)], vec![(8, 4), (9, 6)]).mode(), 0o644);
        // The mask holds for the owning group, too.
        let masked = Acl {
            mask: 2,
            ..list(vec![(7, 6)], vec![])
        };
        assert_eq!(masked.mode(), 0o600);
        let lost = masked.without_group();
        assert_eq!((lost.group, lost.mask, lost.others), (0, 2, 0));
    }
}
