//! Owners by name: numbers differ from host to host.

use nix::unistd::{Gid, Group, Uid, User};

/// Whose a file is to be, by this host's numbers; `None` where nobody here is called so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: Option<u32>,
    /// The group.
    pub group: Option<u32>,
}

impl Owner {
    /// As this host calls them: by names, or by numbers that have none.
    pub fn from_here(user: &str, group: &str) -> Self {
        Self {
            user: user_id(user),
            group: group_id(group),
        }
    }

    /// As another host calls them: its numbers may be other people's here.
    pub fn from_elsewhere(user: &str, group: &str) -> Self {
        Self {
            user: named_user_id(user),
            group: named_group_id(group),
        }
    }
}

/// The name of a user, or its number.
pub fn user_name(id: u32) -> String {
    match User::from_uid(Uid::from_raw(id)) {
        Ok(Some(user)) => user.name,
        _ => id.to_string(),
    }
}

/// The name of a group, or its number.
pub fn group_name(id: u32) -> String {
    match Group::from_gid(Gid::from_raw(id)) {
        Ok(Some(group)) => group.name,
        _ => id.to_string(),
    }
}

/// The user of this name or number here; `None` where there is no such name.
fn user_id(name: &str) -> Option<u32> {
    match User::from_name(name) {
        Ok(Some(user)) => Some(user.uid.as_raw()),
        _ => name.parse().ok(),
    }
}

/// The user of this name here; a number may be another one's, and is no name.
pub fn named_user_id(name: &str) -> Option<u32> {
    let found = User::from_name(name).ok().flatten();
    found.filter(|_| !is_number(name)).map(|user| user.uid.as_raw())
}

/// The group of this name here; a number is no name.
pub fn named_group_id(name: &str) -> Option<u32> {
    let found = Group::from_name(name).ok().flatten();
    found.filter(|_| !is_number(name)).map(|group| group.gid.as_raw())
}

fn is_number(name: &str) -> bool {
    name.parse::<u32>().is_ok()
}

/// The group of this name or number here; `None` where there is no such name.
fn group_id(name: &str) -> Option<u32> {
    match Group::from_name(name) {
        Ok(Some(group)) => Some(group.gid.as_raw()),
        _ => name.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_nobody_of_another_host() {
        let (root, none) = (Some(0), None);
        let known = Owner {
            user: root,
            group: root,
        };
        assert_eq!(Owner::from_here("root", "root"), known);
        assert_eq!(Owner::from_elsewhere("root", "root"), known);
        let numbers = Owner {
            user: Some(54321),
            group: Some(0),
        };
        assert_eq!(Owner::from_here("54321", "0"), numbers);
        let nobody = Owner {
            user: none,
            group: none,
        };
        assert_eq!(Owner::from_elsewhere("54321", "0"), nobody);
        assert_eq!(Owner::from_here("no such user", "no such group"), nobody);
    }
}
