//! A program of the image beside the work: what it does is its own affair, and is not verified.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::console::say;

/// Starts `/jobs/NAME`, and from then on says its lines as `job LINE`.
pub(crate) fn start(name: &str) -> Result<(), String> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(format!("ff.job={name} is not a name"));
    }
    let path = format!("/jobs/{name}");
    let mut job = Command::new(&path)
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{path}: {e}; the image is to be made with tools/build-guest-with"))?;
    let (out, err) = (job.stdout.take(), job.stderr.take());
    std::thread::spawn(move || {
        let pass_on = |line: Result<String, _>| line.map_or((), |line| say!("job {line}"));
        out.into_iter().for_each(|out| BufReader::new(out).lines().for_each(pass_on));
        err.into_iter().for_each(|err| BufReader::new(err).lines().for_each(pass_on));
        match job.wait() {
            Ok(status) => say!("job failed: it has ended, {status}"),
            Err(error) => say!("job failed: {error}"),
        }
    });
    Ok(())
}
