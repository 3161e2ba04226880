//! A client of redis: commands in a row, replies in the same order.
//!
//! The protocol is RESP 2, of <https://redis.io/docs/latest/develop/reference/protocol-spec/>.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// Longer strings and arrays than any that are asked for here: the server is broken.
const MAX_LENGTH: usize = 1 << 20;
/// Of a text that is shown.
const SHOWN_BYTES: usize = 80;

/// What the server says to a command.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR ...`
    Error(String),
    /// `:7`
    Integer(i64),
    /// A string of bytes, or none.
    Bulk(Option<Vec<u8>>),
    /// Several.
    Array(Vec<Reply>),
}

impl Reply {
    pub(crate) fn ok() -> Self {
        Reply::Status("OK".to_owned())
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Status(text) => write!(f, "+{text}"),
            Reply::Error(text) => write!(f, "-{text}"),
            Reply::Integer(number) => write!(f, ":{number}"),
            Reply::Bulk(None) => f.write_str("none"),
            Reply::Bulk(Some(bytes)) => {
                let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]);
                write!(f, "{} bytes {shown:?}", bytes.len())
            }
            Reply::Array(replies) => f.debug_list().entries(replies).finish(),
        }
    }
}

/// Appends one command.
fn put_command(out: &mut Vec<u8>, words: &[&[u8]]) {
    let mut put = |sign: char, length: usize| out.extend(format!("{sign}{length}\r\n").bytes());
    put('*', words.len());
    for word in words {
        out.extend(format!("${}\r\n", word.len()).bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// Reads one reply.
fn read_reply(input: &mut impl BufRead) -> Result<Reply, String> {
    read_at_depth(input, 0)
}

fn read_at_depth(input: &mut impl BufRead, depth: usize) -> Result<Reply, String> {
    let failed = |e: std::io::Error| format!("read from redis: {e}");
    let mut line = Vec::new();
    input.by_ref().take(MAX_LENGTH as u64).read_until(b'\n', &mut line).map_err(failed)?;
    let strange = || format!("redis says {:?}", String::from_utf8_lossy(&line));
    let text = line.strip_suffix(b"\r\n").and_then(|line| str::from_utf8(line).ok());
    let text = text.ok_or_else(strange)?;
    let (sign, rest) = text.split_at_checked(1).ok_or_else(strange)?;
    let length = || match rest.parse::<usize>() {
        Ok(length) if length <= MAX_LENGTH => Ok(length),
        _ => Err(strange()),
    };
    Ok(match sign {
        "+" => Reply::Status(rest.to_owned()),
        "-" => Reply::Error(rest.to_owned()),
        ":" => Reply::Integer(rest.parse().map_err(|_| strange())?),
        "$" if rest == "-1" => Reply::Bulk(None),
        "$" => {
            let mut bytes = vec![0; length()? + 2];
            input.read_exact(&mut bytes).map_err(failed)?;
            bytes.truncate(bytes.len() - 2);
            Reply::Bulk(Some(bytes))
        }
        // No reply that is asked for has arrays in arrays.
        "*" if depth == 0 => {
            let replies = (0..length()?).map(|_| read_at_depth(input, 1));
            Reply::Array(replies.collect::<Result<_, _>>()?)
        }
        _ => return Err(strange()),
    })
}

/// A connection.
pub(crate) struct Client {
    input: BufReader<TcpStream>,
    commands: Vec<u8>,
}

impl Client {
    pub(crate) fn new(stream: TcpStream) -> Result<Self, String> {
        stream.set_nodelay(true).map_err(|e| format!("no delay: {e}"))?;
        Ok(Client { input: BufReader::with_capacity(1 << 16, stream), commands: Vec::new() })
    }

    /// Adds a command to those that [`Self::send`] sends.
    pub(crate) fn add(&mut self, words: &[&[u8]]) {
        put_command(&mut self.commands, words);
    }

    /// Sends what was added; a reply comes for each.
    pub(crate) fn send(&mut self) -> Result<(), String> {
        let sent = self.input.get_mut().write_all(&self.commands);
        self.commands.clear();
        sent.map_err(|e| format!("write to redis: {e}"))
    }

    /// The reply to the oldest command that has not got one.
    pub(crate) fn reply(&mut self) -> Result<Reply, String> {
        read_reply(&mut self.input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies(mut bytes: &[u8]) -> Vec<Result<Reply, String>> {
        let mut replies = Vec::new();
        while !bytes.is_empty() {
            replies.push(read_reply(&mut bytes));
        }
        replies
    }

    #[test]
    fn a_command_is_an_array_of_strings() {
        let mut out = Vec::new();
        put_command(&mut out, &[b"SET", b"a:1", b"x\r\ny"]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$3\r\na:1\r\n$4\r\nx\r\ny\r\n");
    }

    #[test]
    fn replies_of_every_kind_are_read_in_a_row() {
        let bytes = b"+OK\r\n:-7\r\n$-1\r\n$4\r\nx\r\ny\r\n*2\r\n$1\r\na\r\n:1\r\n-ERR no\r\n";
        let bulk = |bytes: &[u8]| Reply::Bulk(Some(bytes.to_owned()));
        let expected = [
            Reply::ok(),
            Reply::Integer(-7),
            Reply::Bulk(None),
            bulk(b"x\r\ny"),
            Reply::Array(vec![bulk(b"a"), Reply::Integer(1)]),
            Reply::Error("ERR no".to_owned()),
        ];
        assert_eq!(replies(bytes), expected.map(Ok));
    }

    #[test]
    fn what_is_no_reply_or_too_long_or_cut_off_is_an_error() {
        let endless = b"*1\r\n".repeat(100_000);
        for bad in [
            &b"?\r\n"[..],
            b"+OK",
            b"$9\r\nab\r\n",
            b"$99999999999\r\n",
            b":x\r\n",
            b"\r\n",
            &endless,
        ] {
            assert!(read_reply(&mut &*bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
        }
    }
}
