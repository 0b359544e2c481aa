//! Typed parameters of a call: read, and rewritten for the call we make in its place.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::os::raw::c_int;
use virt_sys::{
    _virTypedParameter__bindgen_ty_1 as Value, virTypedParameter, virTypedParameterPtr, VIR_TYPED_PARAM_INT,
    VIR_TYPED_PARAM_STRING, VIR_TYPED_PARAM_ULLONG,
};

/// A list of typed parameters as C has it.
///
/// # Safety
/// `params` is NULL or points to `count` parameters that outlive `'a`.
pub unsafe fn entries<'a>(params: virTypedParameterPtr, count: c_int) -> &'a [virTypedParameter] {
    match usize::try_from(count) {
        // SAFETY: as the caller says.
        Ok(count) if count > 0 && !params.is_null() => unsafe { std::slice::from_raw_parts(params, count) },
        _ => &[],
    }
}

/// A list of typed parameters. The caller's own list is never changed: it belongs to the dispatcher.
pub struct Params<'a> {
    entries: Vec<virTypedParameter>,
    /// The strings that entries of ours point to.
    strings: Vec<CString>,
    caller: PhantomData<&'a virTypedParameter>,
}

impl<'a> Params<'a> {
    /// The caller's parameters.
    ///
    /// # Safety
    /// `params` is NULL or points to `count` parameters, with their strings, that outlive `'a`.
    pub unsafe fn borrow(params: virTypedParameterPtr, count: c_int) -> Self {
        Self {
            // SAFETY: as the caller says.
            entries: unsafe { entries(params, count) }.to_vec(),
            strings: Vec::new(),
            caller: PhantomData,
        }
    }

    /// No parameters.
    pub fn none() -> Self {
        Self {
            entries: Vec::new(),
            strings: Vec::new(),
            caller: PhantomData,
        }
    }

    /// The names of all parameters.
    pub fn names(&self) -> impl Iterator<Item = &CStr> {
        self.entries.iter().map(name_of)
    }

    /// The first string parameter of this name.
    pub fn text(&self, name: &CStr) -> Option<&CStr> {
        let entry = self.entries.iter().find(|entry| name_of(entry) == name)?;
        if entry.type_ != VIR_TYPED_PARAM_STRING as c_int {
            return None;
        }
        // SAFETY: the type says that the value is a string pointer.
        let text = unsafe { entry.value.s };
        // SAFETY: NULL, or a string that lives as long as this list.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
    }

    /// [`Self::text`] where it is UTF-8.
    pub fn utf8(&self, name: &CStr) -> Option<&str> {
        self.text(name)?.to_str().ok()
    }

    /// All string parameters of this name.
    pub fn texts(&self, name: &CStr) -> Vec<&str> {
        let entries = self
            .entries
            .iter()
            .filter(|entry| name_of(entry) == name && entry.type_ == VIR_TYPED_PARAM_STRING as c_int);
        // SAFETY: the type says that the value is a string pointer.
        let texts = entries.map(|entry| unsafe { entry.value.s });
        texts
            .filter(|text| !text.is_null())
            // SAFETY: a string that lives as long as this list.
            .filter_map(|text| unsafe { CStr::from_ptr(text) }.to_str().ok())
            .collect()
    }

    /// The first unsigned 64-bit parameter of this name.
    pub fn number(&self, name: &CStr) -> Option<u64> {
        let entry = self.entries.iter().find(|entry| name_of(entry) == name)?;
        // SAFETY: the type says that the value is an unsigned long long.
        (entry.type_ == VIR_TYPED_PARAM_ULLONG as c_int).then_some(unsafe { entry.value.ul })
    }

    /// The first int parameter of this name.
    pub fn integer(&self, name: &CStr) -> Option<i32> {
        let entry = self.entries.iter().find(|entry| name_of(entry) == name)?;
        // SAFETY: the type says that the value is an int.
        (entry.type_ == VIR_TYPED_PARAM_INT as c_int).then_some(unsafe { entry.value.i })
    }

    /// This list without the parameters of this name.
    pub fn without(mut self, name: &CStr) -> Self {
        self.entries.retain(|entry| name_of(entry) != name);
        self
    }

    /// This list with only the parameters of these names.
    pub fn only(mut self, names: &[&CStr]) -> Self {
        self.entries.retain(|entry| names.contains(&name_of(entry)));
        self
    }

    /// This list with one string parameter of this name, in place of any it had.
    pub fn with(self, name: &CStr, value: &str) -> Self {
        let Ok(value) = CString::new(value) else {
            return self.without(name);
        };
        let s = value.as_ptr().cast_mut();
        let mut list = self.with_value(name, VIR_TYPED_PARAM_STRING, Value { s });
        list.strings.push(value);
        list
    }

    /// [`Self::with`] for an unsigned 64-bit parameter.
    #[cfg(test)]
    pub fn with_number(self, name: &CStr, ul: u64) -> Self {
        self.with_value(name, VIR_TYPED_PARAM_ULLONG, Value { ul })
    }

    /// [`Self::with`] for an int parameter.
    #[cfg(test)]
    pub fn with_integer(self, name: &CStr, i: i32) -> Self {
        self.with_value(name, VIR_TYPED_PARAM_INT, Value { i })
    }

    fn with_value(self, name: &CStr, type_: u32, value: Value) -> Self {
        let mut list = self.without(name);
        let mut field = [0; 80];
        let name = name.to_bytes_with_nul();
        assert!(
            name.len() <= field.len(),
            "libvirt's parameter names fit their field"
        );
        for (to, from) in field.iter_mut().zip(name) {
            *to = *from as std::os::raw::c_char;
        }
        list.entries.push(virTypedParameter {
            field,
            type_: type_ as c_int,
            value,
        });
        list
    }

    /// A second list of the same parameters, for the call of another phase.
    pub fn share(&self) -> Params<'_> {
        Params {
            entries: self.entries.clone(),
            strings: Vec::new(),
            caller: PhantomData,
        }
    }

    /// For a call: NULL where there are none, as libvirt has it.
    pub fn pointer(&self) -> virTypedParameterPtr {
        if self.entries.is_empty() {
            return std::ptr::null_mut();
        }
        self.entries.as_ptr().cast_mut()
    }

    /// For a call.
    pub fn count(&self) -> c_int {
        self.entries.len() as c_int
    }
}

fn name_of(entry: &virTypedParameter) -> &CStr {
    // SAFETY: field is an array of 80 bytes and lives as long as the entry.
    let bytes = unsafe { std::slice::from_raw_parts(entry.field.as_ptr().cast::<u8>(), entry.field.len()) };
    CStr::from_bytes_until_nul(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewritten_list_says_what_was_asked() {
        let list = Params::none()
            .with(c"migrate_uri", "tcp://a")
            .with(c"listen_address", "::");
        assert_eq!(list.utf8(c"migrate_uri"), Some("tcp://a"));
        let list = list.with(c"migrate_uri", "unix:///b").without(c"listen_address");
        assert_eq!(list.utf8(c"migrate_uri"), Some("unix:///b"));
        assert_eq!((list.count(), list.utf8(c"listen_address")), (1, None));
        // SAFETY: the list outlives its copy.
        let copy = unsafe { Params::borrow(list.pointer(), list.count()) };
        assert_eq!(copy.names().collect::<Vec<_>>(), [c"migrate_uri"]);
        assert!(Params::none().pointer().is_null());
    }
}
