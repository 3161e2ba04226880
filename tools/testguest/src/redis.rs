//! Work on a real server: redis holds the data, and a client in the same guest uses them over
//! loopback and knows what each reply must be.
//!
//! Keys come in groups of twelve, about 16 KiB: eight strings of up to 2,600 bytes, two counters, a hash of
//! eight fields, a list of sixteen items. What a key holds follows from its number and how many
//! times it was written, its *version*; so the client keeps one number for each key. Half of the operations read
//! a string; the others write: `SET` 20 %, `INCR` 10 %, `HSET` 10 %, `LPUSH` with `LTRIM` 10 %. Three of four go to a
//! tenth of the groups, by a power law.
//!
//! The client waits for the replies to what it has sent, so one thread still does all: a gap between
//! heartbeats is a time in which the work did not get on, whether client or server stood still.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::interface;
use crate::memory::vocabulary;
use crate::params::Params;
use crate::random::Random;
use crate::resp::{Client, Reply};
use crate::work::{Progress, Work};

/// Where `tools/build-guest-with redis` puts it.
const PROGRAM: &str = "/usr/bin/redis-server";
const PORT: u16 = 6379;
const LOG: &str = "/redis.log";
const START_LIMIT: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(20);

const GROUP_BYTES: u64 = 16 << 10;
const KEYS_PER_GROUP: usize = 12;
const STRINGS: usize = 8;
const COUNTERS: usize = 2;
const FIELDS: u64 = 8;
const ITEMS: u64 = 16;
/// Groups that are filled between two looks at the replies.
const FILL_GROUPS: usize = 4;

/// What a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    String,
    Counter,
    Hash,
    List,
}

impl Kind {
    fn of(key: usize) -> Self {
        match key % KEYS_PER_GROUP {
            place if place < STRINGS => Kind::String,
            place if place < STRINGS + COUNTERS => Kind::Counter,
            place if place == STRINGS + COUNTERS => Kind::Hash,
            _ => Kind::List,
        }
    }

    /// How many times a key counts as written when it is filled.
    fn first_version(self) -> u64 {
        match self {
            Kind::String | Kind::Counter => 1,
            Kind::Hash => FIELDS,
            Kind::List => ITEMS,
        }
    }
}

/// What keys must hold.
struct Records {
    versions: Vec<u64>,
    words: Vec<&'static [u8]>,
}

impl Records {
    fn new(groups: u64) -> Self {
        let keys = groups as usize * KEYS_PER_GROUP;
        let versions = (0..keys).map(|key| Kind::of(key).first_version()).collect();
        Records { versions, words: vocabulary() }
    }

    fn name(key: usize) -> Vec<u8> {
        let kind = match Kind::of(key) {
            Kind::String => "session",
            Kind::Counter => "hits",
            Kind::Hash => "user",
            Kind::List => "events",
        };
        format!("{kind}:{key}").into_bytes()
    }

    fn field(version: u64) -> Vec<u8> {
        format!("field{}", version % FIELDS).into_bytes()
    }

    /// A record as programs store it: most of its text stays from version to version.
    fn value(&self, key: usize, version: u64) -> Vec<u8> {
        let mut of_key = Random::new(key as u64);
        let mut of_version = Random::new((key as u64) << 32 ^ version);
        let (least, spread) = match Kind::of(key) {
            Kind::String => (200, 2400),
            Kind::Hash => (60, 300),
            _ => (40, 120),
        };
        let length = least + of_key.below(spread) as usize;
        let mut value = Vec::with_capacity(length + 32);
        let status = self.word(&mut of_version);
        let seen = 1_700_000_000 + version * 61 + of_version.below(60);
        let token = of_version.next();
        // Writing to a vector cannot fail.
        let _ = write!(value, "{{\"id\":{key},\"version\":{version},\"seen\":{seen},\"status\":\"");
        value.extend_from_slice(status);
        let _ = write!(value, "\",\"token\":\"{token:016x}\",\"text\":\"");
        while value.len() < length {
            value.extend_from_slice(self.word(&mut of_key));
            value.push(b' ');
        }
        value.extend_from_slice(b"\"}");
        value
    }

    fn word(&self, random: &mut Random) -> &'static [u8] {
        self.words[random.below(self.words.len() as u64) as usize]
    }

    /// The command that reads all of a key, and the right answer.
    fn read(&self, key: usize) -> (Vec<Vec<u8>>, Reply) {
        let (name, version) = (Self::name(key), self.versions[key]);
        let bulk = |version| Reply::Bulk(Some(self.value(key, version)));
        match Kind::of(key) {
            Kind::String => (vec![b"GET".to_vec(), name], bulk(version)),
            Kind::Counter => {
                let number = version.to_string().into_bytes();
                (vec![b"GET".to_vec(), name], Reply::Bulk(Some(number)))
            }
            Kind::Hash => {
                let last = version - FIELDS + 1..=version;
                let fields = last.clone().map(Self::field);
                let command = [b"HMGET".to_vec(), name].into_iter().chain(fields).collect();
                (command, Reply::Array(last.map(bulk).collect()))
            }
            Kind::List => {
                let command = vec![b"LRANGE".to_vec(), name, b"0".to_vec(), b"-1".to_vec()];
                (command, Reply::Array((version - ITEMS + 1..=version).rev().map(bulk).collect()))
            }
        }
    }

    /// The commands that give a key its first content, and the right answers.
    fn fill(&self, key: usize) -> (Vec<Vec<u8>>, Reply) {
        let (name, value) = (Self::name(key), |version| self.value(key, version));
        match Kind::of(key) {
            Kind::String => (vec![b"SET".to_vec(), name, value(1)], Reply::ok()),
            Kind::Counter => (vec![b"SET".to_vec(), name, b"1".to_vec()], Reply::ok()),
            Kind::Hash => {
                let fields =
                    (1..=FIELDS).flat_map(|version| [Self::field(version), value(version)]);
                let command = [b"HSET".to_vec(), name].into_iter().chain(fields).collect();
                (command, Reply::Integer(FIELDS as i64))
            }
            Kind::List => {
                let items = (1..=ITEMS).map(value);
                let command = [b"LPUSH".to_vec(), name].into_iter().chain(items).collect();
                (command, Reply::Integer(ITEMS as i64))
            }
        }
    }

    /// The commands that write a key once more, each with the right answer.
    fn write(&mut self, key: usize) -> Vec<(Vec<Vec<u8>>, Reply)> {
        self.versions[key] += 1;
        let (name, version) = (Self::name(key), self.versions[key]);
        match Kind::of(key) {
            Kind::String => {
                vec![(vec![b"SET".to_vec(), name, self.value(key, version)], Reply::ok())]
            }
            Kind::Counter => {
                vec![(vec![b"INCR".to_vec(), name], Reply::Integer(version as i64))]
            }
            Kind::Hash => {
                let (field, value) = (Self::field(version), self.value(key, version));
                vec![(vec![b"HSET".to_vec(), name, field, value], Reply::Integer(0))]
            }
            Kind::List => {
                let push = vec![b"LPUSH".to_vec(), name.clone(), self.value(key, version)];
                let last = (ITEMS - 1).to_string().into_bytes();
                let trim = vec![b"LTRIM".to_vec(), name, b"0".to_vec(), last];
                vec![(push, Reply::Integer(ITEMS as i64 + 1)), (trim, Reply::ok())]
            }
        }
    }
}

/// A group by a power law: three of four are of the first tenth, which are spread over all.
fn skewed(random: &mut Random, groups: u64) -> u64 {
    const ONE: u64 = 1 << 32;
    let eighth_power = (0..3).fold(random.below(ONE), |x, _| (x * x) >> 32);
    // A large prime: neighbours in rank are no neighbours in memory.
    (((eighth_power * groups) >> 32) * 1_000_003) % groups
}

/// The server, and the client that works on it.
pub(crate) struct RedisWork {
    server: Child,
    client: Client,
    records: Records,
    /// Of what was sent: the key, and the right answer.
    expected: VecDeque<(usize, Reply)>,
    groups: u64,
    random: Random,
    progress: Progress,
}

impl RedisWork {
    /// Starts redis and fills it.
    pub(crate) fn start(params: &Params) -> Result<Self, String> {
        interface::up_loopback()?;
        let server = Command::new(PROGRAM)
            .args(["--bind", "127.0.0.1", "--port", &PORT.to_string()])
            .args(["--save", "", "--appendonly", "no", "--logfile", LOG])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| {
                format!("{PROGRAM}: {e}; make the image with tools/build-guest-with redis")
            })?;
        let client = connect()?;
        let groups = (params.working_set_bytes / GROUP_BYTES).max(1);
        let records = Records::new(groups);
        let mut work = RedisWork {
            server,
            client,
            progress: Progress::new("key", records.versions.len()),
            records,
            expected: VecDeque::new(),
            groups,
            random: Random::new(params.seed ^ 0xffff_0000),
        };
        let keys: Vec<usize> = (0..work.keys()).collect();
        for some in keys.chunks(FILL_GROUPS * KEYS_PER_GROUP) {
            for &key in some {
                let (command, reply) = work.records.fill(key);
                work.add(key, &command, reply);
            }
            work.settle()?;
        }
        Ok(work)
    }

    /// How many there are.
    pub(crate) fn keys(&self) -> usize {
        self.records.versions.len()
    }

    fn add(&mut self, key: usize, command: &[Vec<u8>], reply: Reply) {
        let words: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
        self.client.add(&words);
        self.expected.push_back((key, reply));
    }

    /// Sends what was added and holds the replies against what is right.
    fn settle(&mut self) -> Result<(), String> {
        self.exchange().map_err(|error| {
            let ended = match self.server.try_wait() {
                Ok(Some(status)) => format!("redis has ended, {status}"),
                _ => "redis runs".to_owned(),
            };
            format!("{error}; {ended}; its log ends: {}", last_words())
        })
    }

    fn exchange(&mut self) -> Result<(), String> {
        self.client.send()?;
        while let Some((key, right)) = self.expected.pop_front() {
            let said = self.client.reply()?;
            let result = match said == right {
                true => Ok(()),
                false => Err(format!("redis says {said:?}, right is {right:?}")),
            };
            self.progress.found(key, result);
        }
        Ok(())
    }
}

impl Work for RedisWork {
    fn operate(&mut self, count: u64) -> Result<(), String> {
        for _ in 0..count {
            let group = skewed(&mut self.random, self.groups) as usize * KEYS_PER_GROUP;
            let string = group + self.random.below(STRINGS as u64) as usize;
            let counter = group + STRINGS + self.random.below(COUNTERS as u64) as usize;
            let key = match self.random.below(10) {
                0..5 => {
                    let (command, reply) = self.records.read(string);
                    self.add(string, &command, reply);
                    continue;
                }
                5..7 => string,
                7 => counter,
                8 => group + STRINGS + COUNTERS,
                _ => group + STRINGS + COUNTERS + 1,
            };
            for (command, reply) in self.records.write(key) {
                self.add(key, &command, reply);
            }
        }
        self.settle()?;
        self.progress.operations += count;
        Ok(())
    }

    fn verify_next(&mut self, count: u64) -> Result<(), String> {
        let first = self.progress.next_to_verify();
        for number in 0..count as usize {
            let key = (first + number) % self.keys();
            let (command, reply) = self.records.read(key);
            self.add(key, &command, reply);
        }
        self.settle()?;
        (0..count).for_each(|_| self.progress.verified());
        Ok(())
    }

    fn verify_anew(&mut self) {
        self.progress.verify_anew();
    }

    fn progress(&self) -> &Progress {
        &self.progress
    }
}

fn connect() -> Result<Client, String> {
    let since = Instant::now();
    loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)) {
            Ok(stream) => return Client::new(stream),
            Err(_) if since.elapsed() < START_LIMIT => std::thread::sleep(ASK_AGAIN),
            Err(error) => return Err(format!("connect to redis: {error}; {}", last_words())),
        }
    }
}

fn last_words() -> String {
    let log = std::fs::read_to_string(LOG).unwrap_or_default();
    log.lines().last().unwrap_or("nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As much of redis as the work uses.
    #[derive(Default)]
    struct Model(std::collections::HashMap<Vec<u8>, Vec<Vec<u8>>>);

    impl Model {
        fn run(&mut self, command: &[Vec<u8>]) -> Reply {
            let held = self.0.entry(command[1].clone()).or_default();
            let bulk = |bytes: &Vec<u8>| Reply::Bulk(Some(bytes.clone()));
            let number = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).parse::<i64>().unwrap();
            match command[0].as_slice() {
                b"SET" => *held = vec![command[2].clone()],
                b"GET" => return bulk(&held[0]),
                b"INCR" => {
                    let next = number(&held[0]) + 1;
                    held[0] = next.to_string().into_bytes();
                    return Reply::Integer(next);
                }
                b"HSET" => {
                    held.resize(FIELDS as usize, Vec::new());
                    let mut new = 0;
                    for pair in command[2..].chunks(2) {
                        let field = &mut held[usize::from(pair[0][5] - b'0')];
                        new += i64::from(field.is_empty());
                        field.clone_from(&pair[1]);
                    }
                    return Reply::Integer(new);
                }
                b"HMGET" => {
                    let fields = command[2..].iter();
                    let held = fields.map(|field| bulk(&held[usize::from(field[5] - b'0')]));
                    return Reply::Array(held.collect());
                }
                b"LPUSH" => {
                    command[2..].iter().for_each(|item| held.insert(0, item.clone()));
                    return Reply::Integer(held.len() as i64);
                }
                b"LTRIM" => held.truncate(number(&command[3]) as usize + 1),
                b"LRANGE" => return Reply::Array(held.iter().map(bulk).collect()),
                other => panic!("{}", String::from_utf8_lossy(other)),
            }
            Reply::ok()
        }
    }

    #[test]
    fn a_right_server_says_what_is_expected_and_a_key_of_an_older_version_shows() {
        let mut records = Records::new(4);
        let mut model = Model::default();
        let keys = records.versions.len();
        for key in 0..keys {
            let (command, right) = records.fill(key);
            assert_eq!(model.run(&command), right);
        }
        let mut random = Random::new(7);
        for _ in 0..2000 {
            for (command, right) in records.write(random.below(keys as u64) as usize) {
                assert_eq!(model.run(&command), right);
            }
        }
        for key in 0..keys {
            let (command, right) = records.read(key);
            assert_eq!(model.run(&command), right, "{:?}", Kind::of(key));
            let _ = records.write(key);
            let (command, right) = records.read(key);
            assert_ne!(model.run(&command), right, "{:?}", Kind::of(key));
        }
    }

    #[test]
    fn three_of_four_operations_go_to_a_tenth_of_the_groups_and_none_is_left_out() {
        let (groups, mut random) = (500, Random::new(3));
        let mut counts = vec![0; groups as usize];
        (0..200_000).for_each(|_| counts[skewed(&mut random, groups) as usize] += 1);
        counts.sort_unstable_by_key(|count| std::cmp::Reverse(*count));
        let tenth: u32 = counts[..50].iter().sum();
        assert!((145_000..155_000).contains(&tenth), "{tenth} of 200000");
        assert!(counts[499] > 0);
    }
}
