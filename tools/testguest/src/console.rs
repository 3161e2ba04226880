//! The debug port: a line at a time, byte by byte, to port 0xe9.

#![allow(unsafe_code)]

use std::sync::Mutex;

/// QEMU's `isa-debugcon`, and Bochs before it.
const PORT: u16 = 0xe9;

/// Lines of several threads must not mix.
static LINE: Mutex<()> = Mutex::new(());

/// Writes a formatted line.
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::write_line(&format!($($arg)*)) };
}
pub(crate) use say;

/// Asks the kernel for access to the port. Threads that start later have it too.
pub(crate) fn open() -> Result<(), String> {
    // SAFETY: ioperm only changes which ports this thread may use.
    if unsafe { libc::ioperm(u64::from(PORT), 1, 1) } != 0 {
        return Err(format!("ioperm: {}", std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Writes `line` and a newline.
pub(crate) fn write_line(line: &str) {
    let _guard = LINE.lock();
    for byte in line.bytes().chain([b'\n']) {
        // SAFETY: the port is open to us (see `open`), and a write to it does nothing but reach the
        // other side.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") PORT, in("al") byte, options(nomem, nostack));
        }
    }
}
