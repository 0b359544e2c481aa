//! Buffers that cross the border: allocated with malloc, since the daemon's RPC layer frees them with free.

use std::os::raw::{c_char, c_int};

/// A migration cookie libvirt gave us, or one we made for libvirt.
#[derive(Debug)]
pub struct Cookie {
    data: *mut c_char,
    length: c_int,
}

impl Cookie {
    /// No cookie: what libvirt means by NULL and 0.
    pub fn none() -> Self {
        Self {
            data: std::ptr::null_mut(),
            length: 0,
        }
    }

    /// Takes over what a phase of libvirt returned.
    ///
    /// # Safety
    /// `data` is NULL or points to `length` bytes from malloc that nobody else will free.
    pub unsafe fn take(data: *mut c_char, length: c_int) -> Self {
        Self {
            data,
            length: length.max(0),
        }
    }

    /// A copy of these bytes; no cookie for none.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let Ok(length) = c_int::try_from(bytes.len()) else {
            return Self::none();
        };
        if length == 0 {
            return Self::none();
        }
        // SAFETY: malloc returns NULL or room for bytes.len() bytes, which do not overlap the source.
        let data = unsafe {
            let data = libc::malloc(bytes.len()).cast::<c_char>();
            if !data.is_null() {
                std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), data, bytes.len());
            }
            data
        };
        if data.is_null() {
            return Self::none();
        }
        Self { data, length }
    }

    /// The cookie's bytes with the final NUL; empty where there is no cookie.
    pub fn bytes(&self) -> &[u8] {
        if self.data.is_null() {
            return &[];
        }
        // SAFETY: data points to length initialised bytes that live as long as self.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.length as usize) }
    }

    /// Gives the cookie to the caller of a phase, who frees it.
    ///
    /// # Safety
    /// `data` and `length` are NULL or valid for writing.
    pub unsafe fn hand_over(self, data: *mut *mut c_char, length: *mut c_int) {
        if data.is_null() || length.is_null() {
            return;
        }
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: both are valid for writing, says the caller.
        unsafe {
            *data = this.data;
            *length = this.length;
        }
    }
}

impl Drop for Cookie {
    fn drop(&mut self) {
        // SAFETY: data is NULL or ours, from malloc.
        unsafe { libc::free(self.data.cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_cross_the_border() {
        let (mut data, mut length) = (std::ptr::null_mut(), 0);
        // SAFETY: both are local; what is handed over is taken back.
        let back = unsafe {
            Cookie::copy_of(b"abc\0").hand_over(&mut data, &mut length);
            Cookie::take(data, length)
        };
        assert_eq!(back.bytes(), b"abc\0");
        assert_eq!(Cookie::copy_of(b"").bytes(), b"");
    }
}
