//! The first steps of an init: kernel file systems, and the modules of the initramfs.

#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::console::say;

/// Written by `tools/build-guest`: file names in `/modules`, dependencies first.
const MODULE_LIST: &str = "/modules/order";
const DEVICE_LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn mount_kernel_filesystems() -> Result<(), String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).map_err(|e| format!("mkdir {target}: {e}"))?;
        let (c_kind, c_target) = (c_string(kind), c_string(target));
        // SAFETY: three strings that end with zero bytes and live through the call; no data.
        let result = unsafe {
            libc::mount(c_kind.as_ptr(), c_target.as_ptr(), c_kind.as_ptr(), 0, std::ptr::null())
        };
        if result != 0 {
            return Err(format!("mount {target}: {}", std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Loads what the image brought along. A module may be unfit for this machine (virtio over PCI on a
/// machine without PCI), so a failure is said, and is no error.
///
/// Words `MODULE.KEY=VALUE` of the command line are handed to the module, as modprobe does: so the
/// kernel learns of `virtio_mmio` devices on machines without ACPI.
pub(crate) fn load_modules(command_line: &str) -> Result<(), String> {
    let Ok(order) = fs::read_to_string(MODULE_LIST) else { return Ok(()) };
    for name in order.lines() {
        let path = format!("/modules/{name}");
        let file = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
        let module = name.trim_end_matches(".ko").replace('-', "_");
        let options: Vec<&str> = command_line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix(&module)?.strip_prefix('.'))
            .collect();
        let options = c_string(&options.join(" "));
        // SAFETY: an open descriptor and a string that ends with a zero byte; both outlive the call.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), options.as_ptr(), 0) };
        if result != 0 {
            say!("module {name}: {}", std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Waits for the file of a device, whose driver may still be looking at it.
pub(crate) fn wait_for_device(path: &str) -> Result<(), String> {
    let since = Instant::now();
    while !Path::new(path).exists() {
        if since.elapsed() > DEVICE_LIMIT {
            return Err(format!("no {path}: the machine lacks a device that its work needs"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}
