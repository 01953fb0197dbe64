//! The ring as slots use it: threads that fetch take buffers, tasks fill them, queue their copies and give
//! them back, and a device copies them later.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use shuttle::thread::{self, yield_now};

use super::{any, explore};
use crate::{
    Error, Result,
    ring::{Ring, Staged},
    sync::{self, Condvar, Sender, join_all},
};

/// Words of a buffer.
const SIZE: usize = 2;

/// A buffer of words, which are written one after the other.
struct Buffer {
    words: Arc<[AtomicU64]>,
    copied: Arc<Event>,
}

/// How many copies were queued and are not over.
struct Event {
    left: sync::Mutex<u64>,
    passed: Condvar,
    /// Whether the next wait for it fails.
    fails: Mutex<bool>,
}

/// A copy that the device is to make of a buffer with these words.
struct Copy {
    of: Arc<[AtomicU64]>,
    word: u64,
    copied: Arc<Event>,
}

impl Staged for Buffer {
    fn wait(&self) -> Result<()> {
        let mut left = self.copied.left.lock();
        while *left > 0 {
            self.copied.passed.wait(&mut left);
        }
        let mut fails = self.copied.fails.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *fails) {
            true => Err(Error::Device("a copy failed".into())),
            false => Ok(()),
        }
    }
}

impl Buffer {
    fn new(size: usize, fails: bool) -> Self {
        let (left, passed) = (sync::Mutex::new(0), Condvar::new());
        let copied = Arc::new(Event { left, passed, fails: Mutex::new(fails) });
        Self { words: (0..size).map(|_| AtomicU64::new(0)).collect(), copied }
    }

    fn fill(&self, size: usize, word: u64) {
        for place in &self.words[..size] {
            yield_now();
            place.store(word, Relaxed);
        }
    }

    fn copy(&self, queue: &Sender<Copy>, word: u64) {
        *self.copied.left.lock() += 1;
        let copy = Copy { of: self.words.clone(), word, copied: self.copied.clone() };
        assert!(queue.send(copy).is_ok());
    }
}

/// Brings `pieces` pieces through the ring, as one fetch does; one of them may be unreadable.
fn stage(
    ring: &Arc<Ring<Buffer>>,
    queue: &Arc<Sender<Copy>>,
    pieces: u64,
    unreadable: Option<u64>,
) -> Result<()> {
    let mut tasks = Vec::new();
    let mut done = Ok(());
    for word in 1..=pieces {
        let buffer = match ring.take() {
            Ok(buffer) => buffer,
            Err(error) => {
                done = Err(error);
                break;
            }
        };
        let (ring, queue) = (ring.clone(), queue.clone());
        tasks.push(thread::spawn(move || {
            buffer.fill(ring.size, word);
            if unreadable != Some(word) {
                buffer.copy(&queue, word);
            }
            ring.put(buffer);
        }));
    }
    for task in tasks {
        task.join().unwrap();
    }
    done
}

/// The device: copies in order, whenever it comes to it.
fn device() -> Sender<Copy> {
    let (queue, copies) = sync::unbounded::<Copy>();
    let run = move || {
        for Copy { of, word, copied } in copies.iter() {
            for place in &*of {
                yield_now();
                assert_eq!(place.load(Relaxed), word, "written before its last copy was over");
            }
            *copied.left.lock() -= 1;
            copied.passed.notify_all();
        }
    };
    sync::spawn("device".into(), run).unwrap();
    queue
}

#[test]
fn buffers_are_written_only_when_their_last_copy_is_over() {
    explore(|| {
        let buffers = any(&[2, 3]);
        // One wait may fail: that fetch ends, and the buffer stays in the ring.
        let fails = any(&[None, Some(0), Some(1)]);
        let idle = (0..buffers).map(|at| Buffer::new(SIZE, fails == Some(at))).collect();
        let ring = Arc::new(Ring::new(idle, SIZE));
        let queue = Arc::new(device());
        let fetches = [3, 4].map(|pieces| {
            let (ring, queue) = (ring.clone(), queue.clone());
            let unreadable = any(&[None, Some(2)]);
            thread::spawn(move || stage(&ring, &queue, pieces, unreadable))
        });
        let failed = fetches.map(|fetch| fetch.join().unwrap().is_err());
        assert_eq!(failed.contains(&true), fails.is_some());
        assert_ne!(failed, [true, true]);
        let all: Vec<Buffer> = (0..buffers).map(|_| ring.take().unwrap()).collect();
        assert!(all.iter().all(|buffer| *buffer.copied.left.lock() == 0));
        drop(queue);
        join_all();
    });
}
