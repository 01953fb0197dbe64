//! Locks, channels and threads: whatever one thread hands to another goes through these.
//!
//! They are those of parking_lot, crossbeam and std. In this crate's unit tests they are shuttle's behind the
//! same calls: they work only inside the scenarios of `handoffs`, and shuttle says which thread runs next.

#[cfg(not(test))]
pub(crate) use self::system::*;
#[cfg(test)]
pub(crate) use self::tested::*;

#[cfg(not(test))]
mod system {
    pub(crate) use std::sync::atomic::AtomicBool;

    pub(crate) use crossbeam_channel::{Receiver, Sender, unbounded};
    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

    /// Starts a thread that nobody joins.
    pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        std::thread::Builder::new().name(name).spawn(run).map(drop)
    }
}

#[cfg(test)]
mod tested {
    use std::{
        collections::VecDeque,
        ops::{Deref, DerefMut},
        sync::{Arc, PoisonError},
    };

    pub(crate) use shuttle::sync::atomic::AtomicBool;
    use shuttle::{sync, thread};

    #[derive(Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    /// Empty only inside [`Condvar::wait`].
    pub(crate) struct MutexGuard<'a, T>(Option<sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            match &self.0 {
                Some(guard) => guard,
                None => unreachable!("the lock is not held"),
            }
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            match &mut self.0 {
                Some(guard) => guard,
                None => unreachable!("the lock is not held"),
            }
        }
    }

    pub(crate) struct Condvar(sync::Condvar);

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self(sync::Condvar::new())
        }

        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            if let Some(held) = guard.0.take() {
                guard.0 = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
            }
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// Shuttle has no channel with several receivers.
    struct Channel<T> {
        queue: Mutex<Queue<T>>,
        changed: Condvar,
    }

    struct Queue<T> {
        sent: VecDeque<T>,
        closed: bool,
    }

    /// Not `Clone`: dropping it closes the channel.
    pub(crate) struct Sender<T>(Arc<Channel<T>>);

    pub(crate) struct Receiver<T>(Arc<Channel<T>>);

    pub(crate) fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let queue = Mutex::new(Queue { sent: VecDeque::new(), closed: false });
        let channel = Arc::new(Channel { queue, changed: Condvar::new() });
        (Sender(channel.clone()), Receiver(channel))
    }

    impl<T> Sender<T> {
        /// A `Result`, as crossbeam's; nobody here sends to receivers that are gone.
        pub(crate) fn send(&self, value: T) -> Result<(), T> {
            self.0.queue.lock().sent.push_back(value);
            self.0.changed.notify_one();
            Ok(())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.queue.lock().closed = true;
            self.0.changed.notify_all();
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            Self(self.0.clone())
        }
    }

    impl<T> Receiver<T> {
        pub(crate) fn iter(&self) -> impl Iterator<Item = T> {
            std::iter::from_fn(|| {
                let mut queue = self.0.queue.lock();
                loop {
                    match queue.sent.pop_front() {
                        None if !queue.closed => self.0.changed.wait(&mut queue),
                        next => return next,
                    }
                }
            })
        }
    }

    pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        *RUNNING.count.lock() += 1;
        let run = || {
            let _ends = Ends;
            run();
        };
        thread::Builder::new().name(name).spawn(run).map(drop)
    }

    /// Waits until every thread of [`spawn`] has come to its end.
    pub(crate) fn join_all() {
        let mut count = RUNNING.count.lock();
        while *count > 0 {
            RUNNING.ended.wait(&mut count);
        }
    }

    struct Running {
        count: Mutex<usize>,
        ended: Condvar,
    }

    shuttle::lazy_static! {
        static ref RUNNING: Running = Running { count: Mutex::new(0), ended: Condvar::new() };
    }

    struct Ends;

    impl Drop for Ends {
        fn drop(&mut self) {
            *RUNNING.count.lock() -= 1;
            RUNNING.ended.notify_all();
        }
    }
}
