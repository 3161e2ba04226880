//! What the guest says and hears. It says a line at a time, byte by byte, to the debug port 0xe9. It
//! hears single bytes on the first serial port, which it polls: neither needs an interrupt.

#![allow(unsafe_code)]

use std::sync::{Mutex, PoisonError};

/// QEMU's `isa-debugcon`, and Bochs before it.
const PORT: u16 = 0xe9;
/// The first serial port; five further is its line status, whose lowest bit says that a byte is there.
const SERIAL: u16 = 0x3f8;

/// Whether the ports are open: until then, as in a test on a host, there is nobody to talk to, and a write would be
/// a fault. Held while a line is written, since lines of several threads must not mix.
static OPEN: Mutex<bool> = Mutex::new(false);

/// Writes a formatted line.
macro_rules! say {
    ($($arg:tt)*) => { $crate::console::write_line(&format!($($arg)*)) };
}
pub(crate) use say;

/// Asks the kernel for access to the ports. Threads that start later have it too.
pub(crate) fn open() -> Result<(), String> {
    for (first, count) in [(PORT, 1), (SERIAL, 8)] {
        // SAFETY: ioperm only changes which ports this thread may use.
        if unsafe { libc::ioperm(u64::from(first), count, 1) } != 0 {
            return Err(format!("ioperm: {}", std::io::Error::last_os_error()));
        }
    }
    *OPEN.lock().unwrap_or_else(PoisonError::into_inner) = true;
    Ok(())
}

/// The next byte that was sent to the guest, if there is one.
pub(crate) fn heard() -> Option<u8> {
    let there = in_byte(SERIAL + 5);
    // All ones: there is no serial port.
    (there != 0xff && there & 1 == 1).then(|| in_byte(SERIAL))
}

fn in_byte(port: u16) -> u8 {
    let byte;
    // SAFETY: the port is open to us (see `open`), and no driver uses it.
    unsafe { std::arch::asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack)) };
    byte
}

/// Writes `line` and a newline.
pub(crate) fn write_line(line: &str) {
    let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if !*open {
        return;
    }
    for byte in line.bytes().chain([b'\n']) {
        // SAFETY: the port is open to us (see `open`), and a write to it does nothing but reach the
        // other side.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") PORT, in("al") byte, options(nomem, nostack));
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn without_ports_there_is_nobody_to_talk_to() {
        say!("{}", "a write to a port would end this process");
    }
}
