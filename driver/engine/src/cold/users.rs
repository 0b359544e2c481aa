//! Owners by name: numbers differ from host to host.

use nix::unistd::{Gid, Group, Uid, User};

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

/// The user of this name here; `None` where there is none.
pub fn user_id(name: &str) -> Option<u32> {
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

/// The group of this name here; `None` where there is none.
pub fn group_id(name: &str) -> Option<u32> {
    match Group::from_name(name) {
        Ok(Some(group)) => Some(group.gid.as_raw()),
        _ => name.parse().ok(),
    }
}
