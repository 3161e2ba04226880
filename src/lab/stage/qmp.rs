//! QEMU's monitor protocol, as much as tests need: one command, one answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Within which QEMU answers unless it is told otherwise.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a QMP socket; QEMU takes one at a time on each.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and takes the greeting.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let lines = BufReader::new(stream.try_clone()?);
        let mut qmp = Qmp { stream, lines };
        let greeting = loop {
            let line = qmp.line()?;
            // QEMU may tell of what happens at this moment before it has seen that somebody else listens now.
            if line.get("event").is_none() {
                break line;
            }
        };
        ensure!(greeting.get("QMP").is_some(), "{} is not a QMP socket", path.display());
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// From now on an answer may take so long, if that is longer than usual. QEMU's monitor is silent while the
    /// last pages of a pre-copy are sent.
    pub fn answer_within(&mut self, time: Duration) -> Result<()> {
        self.stream.set_read_timeout(Some(time.max(ANSWER_TIMEOUT))).context("QMP")
    }

    /// Runs a command and gives what it returns; events are passed over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream, "{request}").context("send a QMP command")?;
        loop {
            let mut line = self.line().with_context(|| format!("after {command}"))?;
            if let Some(error) = line.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("no reason given"));
            }
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// What `query-status` says: `running`, `paused`, `postmigrate`, `inmigrate` ...
    pub fn status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let bytes = self.lines.read_line(&mut line).context("QMP")?;
        ensure!(bytes > 0, "QEMU has closed the QMP connection");
        serde_json::from_str(&line).with_context(|| format!("QMP has said {line:?}"))
    }
}
