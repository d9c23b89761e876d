const STORE = "pictures";

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

let opened;

function database() {
  opened ??= (() => {
    const request = indexedDB.open("emu3", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    return promise(request);
  })();
  return opened;
}

async function store(mode) {
  return (await database()).transaction(STORE, mode).objectStore(STORE);
}

// The same picture or clip, kept twice, is one.
function identity(url) {
  let hash = 0x811c9dc5;
  for (let place = 0; place < url.length; place += 1) hash = Math.imul(hash ^ url.charCodeAt(place), 0x01000193);
  return `${url.length}-${hash >>> 0}`;
}

export async function keep(url, record) {
  const item = { id: identity(url), url, record, time: Date.now() };
  await promise((await store("readwrite")).put(item));
  return item;
}

/** All that is kept, the newest first. */
export async function list() {
  const items = await promise((await store("readonly")).getAll());
  return items.sort((a, b) => b.time - a.time);
}

export async function remove(id) {
  await promise((await store("readwrite")).delete(id));
}
