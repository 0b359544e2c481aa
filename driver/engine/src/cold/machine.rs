//! Which machine this is. A name is given again: to whatever replaces a machine that is lost, or by chance. One that is restored
//! from a backup as a whole is the same machine still.

use ferry_contract::cold::Digest;

/// What names an installation (machine-id(5)), and the hardware that it is on.
const NUMBERS: [&str; 2] = ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"];

/// This machine, by what no other one has: not the numbers themselves, which are nobody else's to know. `None` where there
/// are none.
pub fn this() -> Option<Digest> {
    let numbers = NUMBERS.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    of(&numbers.each_ref().map(|number| number.trim()))
}

fn of(numbers: &[&str]) -> Option<Digest> {
    // An installation that has not been started yet says so there.
    let is_one = |number: &&str| number.len() >= 32;
    numbers.iter().any(is_one).then(|| {
        let mut hasher = blake3::Hasher::new_derive_key("virt-ferry 2026 which machine a guest came from");
        for number in numbers {
            hasher.update(&(number.len() as u64).to_le_bytes());
            hasher.update(number.as_bytes());
        }
        Digest(*hasher.finalize().as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_told_from_another() {
        let (one, two) = (
            "0123456789abcdef0123456789abcdef",
            "01234567-89ab-cdef-0123-456789abcdef",
        );
        let all = [[one, two], [two, two], [one, one], [one, ""], ["", one]].map(|numbers| of(&numbers));
        for (index, machine) in all.iter().enumerate() {
            assert!(
                machine.is_some() && !all[index + 1..].contains(machine),
                "{index}"
            );
        }
        assert_eq!(of(&["uninitialized", ""]), None);
        assert_eq!(this(), this());
    }
}
